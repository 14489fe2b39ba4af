"""CLIP against golden files and transformers: the network, and the byte-pair tokenizer by convention A.

Tolerance 2e-5 on states of size about 1 to 5: float32, where another order of summation differs by about 1e-6.
"""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, normalizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kontext_min.clip import ClipParams, ClipTextEncoder, ClipTokenizer, split_words

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY = GOLDEN / "tok_clip_tiny"
CLOSE = {"rtol": 0, "atol": 2e-5}


def hub_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def golden_encoder():
    config = json.loads((GOLDEN / "clip_tiny.json").read_text())["config"]
    params = ClipParams(**{name: config[name] for name in ClipParams.__dataclass_fields__})
    with torch.device("meta"):
        encoder = ClipTextEncoder(params)
    encoder.load_state_dict(hub_state(load_file(GOLDEN / "clip_tiny.safetensors")), assign=True)
    return encoder.eval()


@torch.no_grad()
def test_golden_states(golden_encoder):
    io = load_file(GOLDEN / "clip_tiny.io.safetensors")
    seen = []
    modules = [*golden_encoder.encoder["layers"], golden_encoder.final_layer_norm]  # what goes into each
    hooks = [module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for module in modules]
    states, pooled = golden_encoder(io["input_ids"])
    for hook in hooks:
        hook.remove()

    torch.testing.assert_close(states, io["last_hidden_state"], **CLOSE)
    torch.testing.assert_close(pooled, io["pooler_output"], **CLOSE)
    assert len(seen) == sum(name.startswith("hidden_") for name in io) == 4
    for i, hidden in enumerate(seen):
        torch.testing.assert_close(hidden, io[f"hidden_{i}"], **CLOSE, msg=lambda text, i=i: f"hidden_{i}: {text}")


@torch.no_grad()
def test_padding_cannot_change_the_pooled_vector(golden_encoder):
    ids = load_file(GOLDEN / "clip_tiny.io.safetensors")["input_ids"][:1]
    end = int(ids[0].argmax())
    other = ids.clone()
    other[0, end + 1 :] = 5
    torch.testing.assert_close(golden_encoder(ids)[1], golden_encoder(other)[1], rtol=0, atol=0)
    # The control: a token before the end does change it.
    other[0, end - 1] = (ids[0, end - 1] + 1) % 100
    assert (golden_encoder(ids)[1] - golden_encoder(other)[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("width", "heads", "layers", "mlp"), [(32, 1, 1, 64), (48, 4, 2, 100), (70, 7, 3, 280)])
@torch.no_grad()
def test_live_parity(width, heads, layers, mlp):
    torch.manual_seed(width)  # transformers draws its weights from the global generator
    config = CLIPTextConfig(
        vocab_size=200,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="quick_gelu",
        initializer_factor=5.0,  # its default weights are so small that attention would be uniform
        bos_token_id=198,
        eos_token_id=2,  # as in the hub's config.json
    )
    theirs = CLIPTextModel(config).eval()
    params = ClipParams(200, width, mlp, layers, heads, layer_norm_eps=config.layer_norm_eps)
    ours = ClipTextEncoder(params).eval()
    ours.load_state_dict(hub_state(theirs.state_dict()), strict=True)

    ids = torch.randint(0, 198, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[0, 10:], ids[1, 40:] = 199, 199
    expected = theirs(ids)
    states, pooled = ours(ids)
    torch.testing.assert_close(states, expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(pooled, expected.pooler_output, **CLOSE)
    torch.testing.assert_close(pooled, states[[0, 1], [10, 40]], rtol=0, atol=0)


def test_eps_is_that_of_the_hub():
    """config.json may leave it out."""
    assert ClipParams().layer_norm_eps == CLIPTextConfig().layer_norm_eps == 1e-5


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size 60 over 7 heads"):
        ClipParams(hidden_size=60, num_attention_heads=7)


# ---------------------------------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return ClipTokenizer(VOCABULARY)


def test_golden_tokens(tokenizer):
    """All 45 strings, also the 16 on which other back-ends disagree: `ids` in the file is convention A."""
    cases = json.loads((GOLDEN / "tokens_clip_tiny.json").read_text())["cases"]
    assert (len(cases), sum("disagree" in case for case in cases)) == (45, 16)
    rows = tokenizer([case["text"] for case in cases])
    assert rows.shape == (45, 77) and rows.dtype == torch.int64
    for case, row in zip(cases, rows.tolist(), strict=True):
        assert row == case["ids"] + [tokenizer.end] * (77 - len(case["ids"])), case["text"]


def test_long_prompts_keep_their_end(tokenizer):
    row = tokenizer(["a " * 500])[0].tolist()
    assert row[0] == tokenizer.start and row[-1] == tokenizer.end
    assert tokenizer.end not in row[:-1] and len(row) == 77


def test_count_tells_which_prompts_are_cut(tokenizer):
    assert tokenizer.count("") == 2
    for words in (74, 75, 76):
        text = "a " * words
        row = tokenizer([text])[0].tolist()
        assert tokenizer.count(text) == words + 2
        assert (row[1 : words + 1] == tokenizer.encode(text)) == (tokenizer.count(text) <= 77)


# Unicode 3.2, which the standard library keeps: so the tests do not depend on the Unicode version of this Python.
KNOWN = [chr(i) for i in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs", "Co")]
PIECES = ["photo", "OLD", "don't", "WE'LL", "'s", "'", "''", "1999", "½", "²", "Ⅳ", "ß", "İ", "Σ", "É", "e\u0301"]
PIECES += [
    "\u0301",
    "Å",
    "日本",
    "😀",
    "👍🏽",
    "ＡＢ",
    " ",
    "  ",
    "\n",
    "\x1c",
    "\x85",
    "\u200b",
    "\u3000",
    "!",
    "&amp;",
]
PIECES += ["<|", "|>", "<|startoftext|>", "<|STARTOFTEXT|>", "<|endoftext|>", "<|EndOfText|>", "İ<|endoftext|>\u0301"]
POOLS = {"ascii": [chr(i) for i in range(128)], "below 0x3000": [c for c in KNOWN if ord(c) < 0x3000]}
POOLS |= {"all": KNOWN, "pieces": PIECES}


@pytest.mark.parametrize("pool", POOLS)
def test_fuzz_against_transformers(tokenizer, pool):
    rng = np.random.default_rng(3)
    texts = ["".join(rng.choice(POOLS[pool], size=rng.integers(1, 50))) for _ in range(300)]
    # The official library composes accents by older Unicode tables: it does not reorder stacked marks added since.
    compose = normalizers.NFC().normalize_str
    kept = [text for text in texts if compose(text) == unicodedata.normalize("NFC", text)]
    assert len(kept) >= 290
    theirs = CLIPTokenizer.from_pretrained(VOCABULARY)
    expected = theirs(kept, padding="max_length", truncation=True, max_length=77)["input_ids"]
    for text, row, expected_row in zip(kept, tokenizer(kept).tolist(), expected, strict=True):
        assert row == expected_row, ascii(text)


def test_classes_are_those_of_unicode():
    r"""Every character is a letter, a number or another, as the official library's \p{L} and \p{N} say."""
    characters = [c for c in KNOWN if normalizers.Replace(Regex(r"\s"), "").normalize_str(c) and not "A" <= c <= "Z"]
    kinds = "".join(characters)  # cleaned texts hold no capital ASCII letter and no space but the plain one
    for pattern, kind in ((r"\p{L}", "a"), (r"\p{N}", "0")):
        kinds = normalizers.Replace(Regex(pattern), kind).normalize_str(kinds)
    assert len(kinds) == len(characters) > 90_000
    for c, kind in zip(characters, kinds, strict=True):
        expected = ["!", c + c, "!"] if kind == "a" else ["!", c, c, "!"] if kind == "0" else [f"!{c}{c}!"]
        assert split_words(f"!{c}{c}!") == expected, ascii(c)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_missing_files(tmp_path, missing):
    for name in {"vocab.json", "merges.txt"} - {missing}:
        (tmp_path / name).write_bytes((VOCABULARY / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=f"{missing}: not found; [^\n]*$"):
        ClipTokenizer(tmp_path)
    with pytest.raises(FileNotFoundError):
        ClipTokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[1]"),
        ("vocab.json", '{"a": 0}'),
        ("merges.txt", "#version\na b c\n"),
        ("merges.txt", (VOCABULARY / "merges.txt").read_text()[:500].rpartition("\n")[0]),  # cut after a whole line
    ],
)
def test_unusable_files(tmp_path, name, content):
    for other in ("vocab.json", "merges.txt"):
        (tmp_path / other).write_bytes((VOCABULARY / other).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="not a CLIP vocabulary") as error:
        ClipTokenizer(tmp_path)
    assert "\n" not in str(error.value)
