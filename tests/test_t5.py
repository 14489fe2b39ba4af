"""T5 against golden files and transformers: the network, its position buckets, and the tokenizer.

Tolerance 2e-5 on states of size about 1 to 5: float32, where another order of summation differs by about 1e-6.
"""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel
from transformers import T5Tokenizer as OfficialTokenizer
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from kontext_min.checkpoints import load_t5
from kontext_min.extras import prompts
from kontext_min.extras.base import Weights
from kontext_min.t5 import RMSNorm, T5Encoder, T5Params, T5Tokenizer, relative_position_bucket

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY = GOLDEN / "tok_t5_tiny"
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def golden_encoder():
    config = json.loads((GOLDEN / "t5_tiny.json").read_text())["config"]
    params = T5Params(**{name: config[name] for name in T5Params.__dataclass_fields__})
    with torch.device("meta"):
        encoder = T5Encoder(params)
    encoder.load_state_dict(load_file(GOLDEN / "t5_tiny.safetensors"), assign=True)
    return encoder.eval()


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "t5_tiny.io.safetensors")


@torch.no_grad()
def test_golden_states(golden_encoder, io):
    seen = []
    modules = [golden_encoder.shared, *golden_encoder.encoder.block[:-1], golden_encoder.encoder.final_layer_norm]
    hooks = [module.register_forward_hook(lambda _, __, output: seen.append(output)) for module in modules]
    states = golden_encoder(io["short.input_ids"])
    for hook in hooks:
        hook.remove()

    torch.testing.assert_close(states, io["short.last_hidden_state"], **CLOSE)
    assert len(seen) == sum(name.startswith("short.hidden_") for name in io) == 4
    for i, hidden in enumerate(seen):  # the last one of the file is after the final norm
        torch.testing.assert_close(
            hidden, io[f"short.hidden_{i}"], **CLOSE, msg=lambda text, i=i: f"hidden_{i}: {text}"
        )
    # Official Flux attends to the padding; with a mask the real tokens would get other states.
    masked = io["short.last_hidden_state_with_mask_REFERENCE_ONLY"]
    real = io["short.input_ids"][0] != 0
    assert (states[0, real] - masked[0, real]).abs().max() > 1e-3


@torch.no_grad()
def test_golden_long(golden_encoder, io):
    """300 tokens, more than the largest distance of the buckets."""
    bias = golden_encoder.encoder.position_bias(300)
    assert bias.shape == (1, 5, 300, 300)
    torch.testing.assert_close(bias[0, :, :1], io["long.position_bias"], rtol=0, atol=0)
    torch.testing.assert_close(golden_encoder(io["long.input_ids"]), io["long.last_hidden_state"], **CLOSE)


def test_golden_buckets(io):
    buckets = relative_position_bucket(io["bucket.relative_position_key_minus_query"], 32, 128)
    assert torch.equal(buckets, io["bucket.bucket"])


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64), (64, 300)])
def test_buckets_against_transformers(num_buckets, max_distance):
    relative = torch.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(relative, True, num_buckets, max_distance)
    assert torch.equal(relative_position_bucket(relative, num_buckets, max_distance), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])  # below: eps dominates; above: squares exceed float16
@torch.no_grad()
def test_norm_against_transformers(dtype, size):
    """Bit for bit, so the statistics are float32 and every rounding happens where the official one does."""
    generator = torch.Generator().manual_seed(0)
    x = (size * torch.randn(4, 64, generator=generator)).to(dtype)
    ours, theirs = RMSNorm(64, eps=1e-6), T5LayerNorm(64, eps=1e-6)
    ours.weight.copy_(torch.randn(64, generator=generator))
    theirs.load_state_dict(ours.state_dict())
    result = ours.to(dtype)(x)
    assert result.dtype == dtype and result.isfinite().all()
    assert torch.equal(result, theirs.to(dtype)(x))


SIZES = [(32, 8, 64, 1, 4, 32, 128), (48, 12, 100, 2, 3, 16, 40), (40, 16, 72, 3, 7, 32, 128)]


def official_encoder(d_model, d_kv, d_ff, layers, heads, buckets, distance):
    torch.manual_seed(d_model)  # transformers draws its weights from the global generator
    config = T5Config(
        vocab_size=90,
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def our_encoder(theirs, size):
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "encoder.embed_tokens.weight"}
    ours = T5Encoder(T5Params(90, *size)).eval()
    ours.load_state_dict(state, strict=True)
    return ours


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_live_parity(size):
    theirs = official_encoder(*size)
    ours = our_encoder(theirs, size)
    ids = torch.randint(0, 90, (2, 150), generator=torch.Generator().manual_seed(0))
    ids[0, 20:] = 0
    torch.testing.assert_close(ours(ids), theirs(ids).last_hidden_state, **CLOSE)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_the_official_one():
    """Both round in bfloat16 at many places, so they agree only as well as each agrees with float32."""
    theirs = official_encoder(*SIZES[2])
    ours = our_encoder(theirs, SIZES[2])
    ids = torch.randint(0, 90, (1, 32), generator=torch.Generator().manual_seed(0))
    exact = ours(ids)
    official_error = (theirs.bfloat16()(ids).last_hidden_state.float() - exact).pow(2).mean().sqrt()
    states = ours.bfloat16()(ids)
    assert states.dtype == torch.bfloat16
    assert 0 < (states.float() - exact).pow(2).mean().sqrt() < 1.3 * official_error


def test_eps_is_that_of_the_hub():
    """config.json may leave it out."""
    assert T5Params().layer_norm_epsilon == T5Config().layer_norm_epsilon == 1e-6


def test_float16_is_refused_and_float16_files_are_not(tmp_path):
    state = {name: x.half() for name, x in load_file(GOLDEN / "t5_tiny.safetensors").items()}
    save_file(state, tmp_path / "t5.safetensors")
    params = T5Params(**{k: v for k, v in json.loads((GOLDEN / "t5_tiny.json").read_text())["config"].items()
                         if k in T5Params.__dataclass_fields__})  # fmt: skip
    with pytest.raises(ValueError, match=r"^T5: got dtype float16, in which it overflows; take bfloat16 or float32\.$"):
        load_t5(tmp_path / "t5.safetensors", params, dtype=torch.float16)
    assert load_t5(tmp_path / "t5.safetensors", params, dtype=torch.bfloat16).shared.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return T5Tokenizer(VOCABULARY)


def test_golden_tokens(tokenizer):
    """All 45 strings. On typed specials we follow transformers, on stacked combining marks sentencepiece itself."""
    cases = json.loads((GOLDEN / "tokens_t5_tiny.json").read_text())["cases"]
    marked = [case["text"] for case in cases if "disagree" in case]
    stacked = "e\u0301\u0302 \u00c5 A\u030a"
    assert len(cases) == 45 and len(marked) == 2
    assert "<extra_id_0>" in marked[0] and unicodedata.normalize("NFC", marked[1]) == unicodedata.normalize(
        "NFC", stacked
    )
    rows = tokenizer([case["text"] for case in cases])
    assert rows.shape == (45, 512) and rows.dtype == torch.int64
    for case, row in zip(cases, rows.tolist(), strict=True):
        expected = case["ids"]
        if case["text"] == marked[1]:
            expected = next(other["ids"] for other in case["disagree"] if "sentencepiece-raw" in other["by"])
            assert expected != case["ids"]
        assert row == expected + [0] * (512 - len(expected)), case["text"]


def test_sentinels_count_down_from_the_last_id(tokenizer):
    pieces = tokenizer.pieces.vocab_size()
    assert tokenizer.encode("<extra_id_99>") == [pieces]
    assert tokenizer.encode("<extra_id_0>") == [pieces + 99]
    text = "<extra_id_100> <extra_id_07>"  # no sentinels
    assert tokenizer.encode(text) == tokenizer.pieces.encode(text)


@pytest.mark.parametrize("length", [1, 16, 512])
def test_truncation_keeps_the_end(tokenizer, length):
    long, empty = tokenizer(["a photo of a cat " * 200, ""], max_length=length).tolist()
    assert len(long) == len(empty) == length
    assert long[-1] == tokenizer.end and tokenizer.end not in long[:-1] and tokenizer.pad not in long
    assert empty == [tokenizer.end] + [tokenizer.pad] * (length - 1)


def test_count_tells_which_prompts_are_cut(tokenizer):
    assert tokenizer.count("") == 1
    for words in range(1, 40):
        text = "a cat " * words
        n = tokenizer.count(text)
        row, short = tokenizer([text], n)[0].tolist(), tokenizer([text], n - 1)[0].tolist()
        assert row == [*tokenizer.encode(text), tokenizer.end] and short == [*row[: n - 2], tokenizer.end]


@pytest.mark.parametrize(("said", "length"), [("1e30", 512), ("513", 512), ("512", 512), ("64", 64), (None, 512)])
def test_length_is_at_most_what_flux_reads(tmp_path, said, length):
    """1e30 stands in many files, as transformers' word for no limit."""
    (tmp_path / "tokenizer_2").mkdir()
    text = "{}" if said is None else f'{{"model_max_length": {said}}}'
    (tmp_path / "tokenizer_2" / "tokenizer_config.json").write_text(text)
    assert prompts.max_length(Weights(tmp_path)) == length


# Unicode 3.2, which the standard library keeps: so the tests do not depend on the Unicode version of this Python.
# Without marks (M) and controls (C): there the re-implementation in transformers differs from sentencepiece.
KNOWN = [chr(i) for i in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(i))[0] not in "CM"]
PIECES = ["photo", "OLD", "don't", "1999", "½", "ß", "É", "e\u0301", "日本", "😀", " ", "  ", "\n", "\t", "\u200b"]
PIECES += ["\u3000", "</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_42>", "<extra_id_99>"]
PIECES += ["<extra_id_100>", "<extra_id_07>"]  # the last two are no sentinels
POOLS = {"ascii": [chr(i) for i in range(128)], "below 0x3000": [c for c in KNOWN if ord(c) < 0x3000]}
POOLS |= {"all": KNOWN, "pieces": PIECES}


@pytest.mark.parametrize("pool", POOLS)
def test_fuzz_against_transformers(tokenizer, pool):
    rng = np.random.default_rng(3)
    texts = ["".join(rng.choice(POOLS[pool], size=rng.integers(1, 50))) for _ in range(300)]
    theirs = OfficialTokenizer.from_pretrained(VOCABULARY)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=512)["input_ids"]
    for text, row, expected_row in zip(texts, tokenizer(texts).tolist(), expected, strict=True):
        assert row == expected_row, ascii(text)


def test_missing_and_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"spiece\.model: not found; [^\n]*$"):
        T5Tokenizer(tmp_path)
    for content in (b"", b"no model"):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"not a sentencepiece model; [^\n]*$"):
            T5Tokenizer(tmp_path)
