"""A whole Kontext edit on weights/tiny, from prompt and picture to picture: ours and diffusers' FluxKontextPipeline."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors.torch import load_file, save, save_file

from kontext_min import checkpoints, flow
from kontext_min.clip import ClipTokenizer
from kontext_min.data import to_float, to_tensor
from kontext_min.extras import base, prompts
from kontext_min.flow import Objective
from kontext_min.restore import restore, to_image
from kontext_min.t5 import T5Tokenizer

TINY = Path(__file__).parent.parent / "weights" / "tiny"
PHOTO = Path(__file__).parent / "photos" / "bowl.jpg"
PROMPT = "Restore this photo: remove blur, noise and compression artifacts."


@pytest.fixture(scope="module")
def pipeline():
    pipe = FluxKontextPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    # An untrained network predicts next to nothing; with some noise on its weights the comparison means something.
    torch.manual_seed(0)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p += 0.05 * torch.randn_like(p)
    return pipe


@pytest.mark.parametrize("size", [(96, 64), (64, 64)])
def test_whole_edit_within_one_level_of_diffusers(pipeline, tmp_path, size):
    width, height = size
    image = Image.open(PHOTO).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    weights = base.Weights(TINY, transformer=tmp_path / "transformer")
    pipeline.transformer.save_pretrained(weights.transformer)
    ae = checkpoints.load_autoencoder(TINY, dtype=torch.float32)
    flux = checkpoints.load_flux(weights.path("transformer"), dtype=torch.float32)
    noise = torch.randn(1, ae.params.z_channels, height // ae.factor, width // ae.factor)

    expected = pipeline(
        image=image, prompt=PROMPT, height=height, width=width, max_area=height * width, _auto_resize=False,
        num_inference_steps=5, guidance_scale=2.5, latents=flow.pack(noise), output_type="pil",
        max_sequence_length=prompts.max_length(weights),
    ).images[0]  # fmt: skip

    encoded = prompts.encode([PROMPT], weights, None, torch.float32, "cpu")
    prompt = prompts.batch(encoded, [PROMPT], 2.5, torch.float32, "cpu")
    ours = to_image(restore(to_tensor(image)[None], flux, ae, prompt, Objective("kontext"), steps=5, noise=noise)[0])

    assert expected.size == ours.size == size
    difference = np.abs(np.asarray(expected, dtype=int) - np.asarray(ours, dtype=int))
    assert difference.max() <= 1
    control = np.asarray(to_image(ae.decode(ae.encode(to_float(to_tensor(image))[None]))[0]), dtype=int)
    assert np.abs(control - np.asarray(ours, dtype=int)).mean() > 5  # the edit did something


def test_text_encoders_agree_on_the_bundle(pipeline):
    weights = base.Weights(TINY)
    length = prompts.max_length(weights)
    for text in (PROMPT, "", "Colourise the 1920s' photo, naïve café!"):
        txt, pooled, _ = pipeline.encode_prompt(text, None, max_sequence_length=length)
        ours = prompts.encode([text], weights, None, torch.float32, "cpu")[text]
        assert (ours[0] - txt[0]).abs().max() <= 2e-5
        assert (ours[1] - pooled[0]).abs().max() <= 2e-5


def states(encoded, text):
    """txt and y of a text, from the file that keeps them."""
    tensors = load_file(encoded[text])
    return tensors["txt"], tensors["y"]


def test_prompts_are_cached_by_content_and_the_encoders_stay_closed(tmp_path, monkeypatch):
    weights = base.Weights(TINY)
    first = prompts.encode([PROMPT, "b"], weights, tmp_path, torch.float32, "cpu")
    monkeypatch.setattr(prompts, "load_t5", lambda *a, **k: pytest.fail("T5 was loaded although all is cached"))
    again = prompts.encode(["b", PROMPT, PROMPT], weights, tmp_path, torch.float32, "cpu")
    for text in (PROMPT, "b"):
        kept, fresh = states(again, text), prompts.batch(first, [text], 1.0, torch.float32, "cpu")
        assert torch.equal(kept[0][None], fresh.txt) and torch.equal(kept[1][None], fresh.y)
    assert first == again and not torch.equal(states(again, "b")[0], states(again, PROMPT)[0])
    with pytest.raises(pytest.fail.Exception):
        prompts.encode(["c"], weights, tmp_path, torch.float32, "cpu")
    a, b = (again[text].read_bytes() for text in (PROMPT, "b"))
    again[PROMPT].write_bytes(b)  # the file of another prompt
    with pytest.raises(pytest.fail.Exception):
        prompts.encode([PROMPT], weights, tmp_path, torch.float32, "cpu")
    again[PROMPT].write_bytes(a[:-1] + bytes([a[-1] ^ 1]))
    prompts._read.cache_clear()
    with pytest.raises(pytest.fail.Exception):
        prompts.encode([PROMPT], weights, tmp_path, torch.float32, "cpu")
    assert not again[PROMPT].exists()
    again[PROMPT].write_bytes(a[:-1] + bytes([a[-1] ^ 1]))
    monkeypatch.setattr(prompts, "MANY", 0)
    broken = prompts.encode([PROMPT], weights, tmp_path, torch.float32, "cpu")
    with pytest.raises(OSError, match="its values are not those that were written; deleted, and made again"):
        prompts.batch(broken, [PROMPT], 1.0, torch.float32, "cpu")
    assert not again[PROMPT].exists() and again["b"].exists()


def test_a_file_of_another_prompt_is_not_used_even_once(tmp_path):
    weights = base.Weights(TINY)
    files = prompts.encode([PROMPT, "b"], weights, tmp_path, torch.float32, "cpu")
    right = states(files, PROMPT)[0].clone()
    for content in (
        files["b"].read_bytes(),
        save({"control": torch.ones(1)}, {"key": files[PROMPT].stem + prompts.CODE}),
    ):
        files[PROMPT].write_bytes(content)
        prompts._read.cache_clear()  # as in a new process
        again = prompts.encode([PROMPT], weights, tmp_path, torch.float32, "cpu")
        assert torch.equal(states(again, PROMPT)[0], right)


def test_what_other_code_has_encoded_is_encoded_again(tmp_path, monkeypatch):
    def encode():
        encoded = prompts.encode([PROMPT], base.Weights(TINY), tmp_path, torch.float32, "cpu")
        return states(encoded, PROMPT)[0].clone()

    right = encode()
    monkeypatch.setattr(prompts, "CODE", "an edit")
    monkeypatch.setattr(prompts, "load_t5", lambda *a, **k: lambda ids: torch.zeros(1, 512, 8))  # its result
    assert encode().shape == (512, 8)
    monkeypatch.undo()
    assert torch.equal(encode(), right)
    there = prompts.encode([PROMPT], base.Weights(TINY), tmp_path, torch.float32, "cpu")  # of a long run
    monkeypatch.setattr(prompts, "CODE", "an edit")
    monkeypatch.setattr(prompts, "load_t5", lambda *a, **k: lambda ids: torch.zeros(1, 512, 8))
    encode()
    monkeypatch.undo()
    prompts._read.cache_clear()  # the run has read other prompts since
    with pytest.raises(OSError, match="a program with other code has written it since the start; start again"):
        prompts.batch(there, [PROMPT], 1.0, torch.float32, "cpu")


def test_the_cache_knows_its_weights_and_its_dtype(tmp_path):
    """Over one cache: other weights of either encoder, or another dtype, give other states and not those of before."""
    folder = shutil.copytree(TINY, tmp_path / "w", ignore=shutil.ignore_patterns("transformer", "vae"))
    weights, cache = base.Weights(folder), tmp_path / "cache"

    def encode(dtype=torch.float32):
        return states(prompts.encode([PROMPT], weights, cache, dtype, "cpu"), PROMPT)

    def spoil(part):
        (file,) = (folder / part).glob("*.safetensors")
        tensors = {k: 1.5 * v if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(tensors, file)

    before = [x.clone() for x in encode()]
    marks = prompts.fingerprints(weights, ("clip", "t5", "words"))
    config = folder / "tokenizer_2" / "tokenizer_config.json"
    known = config.read_text()
    config.write_text(json.dumps(json.loads(known) | {"model_max_length": 16}))
    assert {k for k, v in prompts.fingerprints(weights, ("clip", "t5", "words")).items() if v != marks[k]} == {"words"}
    config.write_text(known)
    narrow = encode(torch.bfloat16)
    assert [x.dtype for x in narrow] == [torch.bfloat16] * 2 and [x.dtype for x in encode()] == [torch.float32] * 2
    spoil("text_encoder_2")
    txt, y = (x.clone() for x in encode())
    assert not torch.equal(txt, before[0]) and torch.equal(y, before[1])
    spoil("text_encoder")
    again = encode()
    assert torch.equal(again[0], txt) and not torch.equal(again[1], y)
    assert len(list(cache.iterdir())) == 4


def test_a_file_of_the_cache_that_is_not_whole_is_made_again(tmp_path):
    weights = base.Weights(TINY)
    encode = lambda: prompts.encode([PROMPT], weights, tmp_path, torch.float32, "cpu")  # noqa: E731
    expected = [x.clone() for x in states(encode(), PROMPT)]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    other = tmp_path / "other"
    save_file({"x": torch.zeros(3)}, other)
    for broken in (*(whole[:n] for n in (0, 7, 9, 60, len(whole) // 2, len(whole) - 1)), b"x" * 99, other.read_bytes()):
        file.write_bytes(broken)
        encoded = encode()
        assert file.read_bytes() == whole
        prompts._read.cache_clear()
        prompt = prompts.batch(encoded, [PROMPT], 1.0, torch.float32, "cpu")
        assert torch.equal(prompt.txt[0], expected[0]) and torch.equal(prompt.y[0], expected[1])


@pytest.mark.parametrize(
    ("value", "length"),
    [("1e30", 512), ("1" + "0" * 30, 512), ('"many"', 512), ("null", 512), ("-1", 512), ("0", 512), ("true", 512),
     ("7.5", 512), ("[]", 512), ("48", 48), ("512", 512)],
)  # fmt: skip
def test_a_length_that_makes_no_sense_is_512(tmp_path, value, length):
    weights = base.Weights(tmp_path)
    (tmp_path / "tokenizer_2").mkdir()
    assert prompts.max_length(weights) == 512
    (tmp_path / "tokenizer_2" / "tokenizer_config.json").write_text(f'{{"model_max_length": {value}}}')
    assert prompts.max_length(weights) == length
    (tmp_path / "tokenizer_2" / "tokenizer_config.json").write_text("not JSON")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not a JSON object"):
        prompts.max_length(weights)


def test_characters_that_t5_does_not_know_are_said(capsys):
    """To T5 two Japanese words are the same two tokens; CLIP spells them out in bytes."""
    t5 = T5Tokenizer(TINY / "tokenizer_2")
    assert t5.encode("日本語") == t5.encode("修復")
    assert t5.encode("\u200b") == []
    prompts.encode(["日本語", "修復", "\u200b", "remove the noise"], base.Weights(TINY), None, torch.float32, "cpu")
    line = (
        "note: T5 has no tokens for some characters of 3 of 4 prompts: all of these mean the same to it; write English"
    )
    assert capsys.readouterr().out == line + "\n"


def test_prompts_that_are_too_long_are_counted(capsys, tmp_path):
    """The bundle's T5 reads 31 tokens and </s>, CLIP 75 and its two marks."""
    weights = base.Weights(TINY)
    clip, t5 = ClipTokenizer(TINY / "tokenizer"), T5Tokenizer(TINY / "tokenizer_2")
    texts = ["a" + " photo" * 10, *(f"{k}" + " photo" * 40 for k in range(2)), "b" + " photo" * 90]
    longest = [max(len(tokenizer.encode(text)) for text in texts) for tokenizer in (clip, t5)]
    over = [
        sum(len(tok.encode(text)) > n for text in texts)
        for tok, n in ((clip, 75), (t5, prompts.max_length(weights) - 1))
    ]
    assert 0 < over[0] < over[1] < len(texts)
    prompts.encode([*texts, texts[0]], weights, None, torch.float32, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert f"CLIP reads 75 tokens of a prompt: {over[0]} of 4 prompts are longer, up to {longest[0]} tokens" in lines[0]
    assert (
        f"T5 reads {prompts.max_length(weights) - 1} tokens of a prompt: {over[1]} of 4 prompts are longer" in lines[1]
    )
    prompts.encode(["short"], weights, None, torch.float32, "cpu")
    assert not capsys.readouterr().out
    for _ in range(2):  # from the cache, too
        prompts.encode([texts[-1]], weights, tmp_path, torch.float32, "cpu")
        assert capsys.readouterr().out.count("1 of 1 prompts are longer") == 2
