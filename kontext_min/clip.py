"""The CLIP-L text encoder and its byte-pair tokenizer: a prompt becomes one vector that steers every block of Flux.

    x        = token_embedding[ids] + position_embedding
    x        = x + attention(norm(x))        causal, scaled by 1 / sqrt(K)        12 layers of these two lines
    x        = x + fc2(quick_gelu(fc1(norm(x))))
    states   = final_layer_norm(x),  pooled = states at the first <|endoftext|>

Sources: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4;
Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units" (byte pairs); openai/CLIP,
clip/simple_tokenizer.py; transformers 5.23, models/clip/modeling_clip.py and tokenization_clip.py.
Attribute names are the hub's without their leading `text_model.`. transformers' CLIPTextModel and CLIPTokenizer do the
same; by hand, it shows where the pooled vector comes from, and a prompt is cleaned up in one known way.
Shapes: B batch, L tokens (77), D width, H heads, K = D / H.

There are three conventions for cleaning up a prompt; this file follows A:
  A. transformers 5 and its older fast tokenizer: NFC, runs of whitespace to one space, each character lowercased alone;
  B. OpenAI's own, also transformers 4 with ftfy: repairs mojibake, straightens quotes, unescapes HTML, str.lower();
  C. transformers 4 without ftfy: BERT's clean-up, with spaces around CJK ideographs.
They give the same ids for plain English. diffusers now runs A.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class ClipParams:
    """Sizes of a CLIP text encoder; the defaults are those of CLIP-L (123,060,480 parameters)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            got = f"hidden_size {self.hidden_size} over {self.num_attention_heads} heads"
            raise ValueError(f"CLIP: {got} leaves a rest: give a number of heads that divides it.")


class SelfAttention(nn.Module):
    """Causal multi-head attention, with biases on all four projections."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.heads = params.num_attention_heads
        self.q_proj = nn.Linear(params.hidden_size, params.hidden_size)
        self.k_proj = nn.Linear(params.hidden_size, params.hidden_size)
        self.v_proj = nn.Linear(params.hidden_size, params.hidden_size)
        self.out_proj = nn.Linear(params.hidden_size, params.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (rearrange(p, "B L (H K) -> B H L K", H=self.heads) for p in projections)
        # Causal, because CLIP was trained that way. What follows the first <|endoftext|> cannot reach the pooled
        # vector, so the padding needs no mask.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(x, "B H L K -> B L (H K)"))


class EncoderLayer(nn.Module):
    """Attention, then MLP, both residual."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)
        self.self_attn = SelfAttention(params)
        self.layer_norm2 = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)
        fc1 = nn.Linear(params.hidden_size, params.intermediate_size)
        fc2 = nn.Linear(params.intermediate_size, params.hidden_size)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp.fc1(self.layer_norm2(x))  # (B, L, intermediate_size)
        # quick_gelu, an approximation of GELU.
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))


class ClipTextEncoder(nn.Module):
    """The CLIP text model without text_projection, which Flux does not use."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        # ModuleDicts give the weights the hub's names.
        tokens = nn.Embedding(params.vocab_size, params.hidden_size)
        positions = nn.Embedding(params.max_position_embeddings, params.hidden_size)
        self.embeddings = nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions})
        layers = nn.ModuleList(EncoderLayer(params) for _ in range(params.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, L <= 77) int64 -> last_hidden_state (B, L, D) and pooled (B, D), in the dtype of the weights.

        Flux uses only the pooled vector. <|endoftext|> must be the highest id, as it is in every CLIP vocabulary.
        """
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[: ids.shape[1]]
        for layer in self.encoder["layers"]:
            x = layer(x)
        x = self.final_layer_norm(x)
        # The padding has the id of <|endoftext|> too; argmax finds the first of equal maxima, the end of the prompt.
        # (The hub's config.json gives 2 as the end token, which is wrong; transformers then uses argmax too.)
        return x, x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]


LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"

# Unicode White_Space. Python's own \s also matches U+001C to U+001F, which the official pattern does not.
WHITESPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# The official pattern, for a lowercased text whose letters are a-z and digits 0-9 (see `split_words`).
WORD = re.compile(r"<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+")


def clean(text: str) -> str:
    """Convention A: compose accents, reduce every run of whitespace to one space, lowercase."""
    # Character by character: str.lower() on a word would turn a final sigma into another letter.
    text = WHITESPACE.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in text)


def split_words(text: str) -> list[str]:
    r"""Cut a cleaned text into contractions, runs of letters, single digits and runs of anything else except spaces.

    The official pattern is `'s|...|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+`. Python's `re` has no \p{L}, so the pattern is
    matched on a stand-in of the same length, in which an ASCII character of the same Unicode category replaces each
    other character. An older Python takes letters that Unicode added later for symbols.
    """
    # "a" and "0" occur in no contraction, so a stand-in cannot complete one.
    in_class = {"L": "a", "N": "0"}
    stand_in = "".join(c if c.isascii() else in_class.get(unicodedata.category(c)[0], "!") for c in text)
    words = [text[match.start() : match.end()] for match in WORD.finditer(stand_in)]
    # Only an end token that was in capitals can occur here (see `encode`). The official code splits it in three.
    return [part for word in words for part in (("<|", "endoftext", "|>") if word == END else (word,))]


def byte_characters() -> dict[int, str]:
    """One printable character for each of the 256 bytes: itself, or U+0100 and on (openai/CLIP bytes_to_unicode)."""
    table = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


class ClipTokenizer:
    """Prompts to ids, as transformers' CLIPTokenizer does (convention A).

    `folder` holds vocab.json (token -> id) and merges.txt (a version line, then one pair a line, best first).
    A missing file is a FileNotFoundError, an unusable one a ValueError.
    """

    def __init__(self, folder: str | Path) -> None:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        for path in (vocab, merges):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: not found; a CLIP tokenizer folder holds vocab.json and merges.txt.")
        try:
            self.ids: dict[str, int] = json.loads(vocab.read_text(encoding="utf-8"))
            lines = merges.read_text(encoding="utf-8").split("\n")[1:]  # splitlines() would also split at U+0085
            pairs = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
            self.start, self.end = self.ids[START], self.ids[END]
            if len(self.ids) != 2 * 256 + len(pairs) + 2:  # bytes inside and at the end of a word, merges, two marks
                raise ValueError(f"{len(pairs)} merges for {len(self.ids)} tokens")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: not a CLIP vocabulary ({error!r}); take the official tokenizer/.") from error
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.byte_characters = byte_characters()
        self.cache: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """B prompts -> (B, 77) int64: start, at most 75 ids, end, and the end token again as padding."""
        rows = [[self.start, *self.encode(text)[: LENGTH - 2], self.end] for text in texts]
        return torch.tensor([row + [self.end] * (LENGTH - len(row)) for row in rows], dtype=torch.int64)  # (B, 77)

    def count(self, text: str) -> int:
        """Number of ids of a prompt with start and end; a prompt with more than 77 is truncated."""
        return len(self.encode(text)) + 2

    def encode(self, text: str) -> list[int]:
        """One prompt -> its ids, without start, end, padding or a length limit."""
        ids: list[int] = []
        # Special tokens in a prompt become their ids. <|endoftext|> is searched in the raw text, so only in lowercase;
        # <|startoftext|> is searched in the cleaned text, so in any case.
        for part in re.split(f"({re.escape(END)})", text):
            if part == END:
                ids.append(self.end)
                continue
            for piece in re.split(f"({re.escape(START)})", clean(part)):
                if piece == START:
                    ids.append(self.start)
                else:
                    ids += [i for word in split_words(piece) for i in self.encode_word(word)]
        return ids

    def encode_word(self, word: str) -> list[int]:
        """One word -> ids: its bytes as characters, the last with </w>, then merge the best pair until none is left."""
        if word in self.cache:
            return self.cache[word]
        tokens = [self.byte_characters[byte] for byte in word.encode("utf-8")]
        tokens[-1] += "</w>"
        while len(tokens) > 1:
            best = min(pairwise(tokens), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            tokens = merge(tokens, best)
        self.cache[word] = [self.ids[token] for token in tokens]
        return self.cache[word]


def merge(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of the pair, from left to right: a a a with (a, a) gives aa a."""
    merged: list[str] = []
    position = 0
    while position < len(tokens):
        width = 2 if tuple(tokens[position : position + 2]) == pair else 1
        merged.append("".join(tokens[position : position + width]))
        position += width
    return merged
