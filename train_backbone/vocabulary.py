"""A small CLIP vocabulary of a few hundred tokens: words of the prompts, and single characters.

The embeddings of CLIP's own 49,408 tokens would be larger than the whole small backbone. The format
is CLIP's (byte pair encoding with `</w>` at the end of a word; `vocab.json`, `merges.txt`), so
`CLIPTokenizer` reads it like its own.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from maskloom.models.stable_diffusion.text import read_tokenizer

CLIP_FILES = ("vocab.json", "merges.txt")
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CHARACTERS = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))
# Words that users of a medical backbone are likely to type, even if no training prompt has them.
DOMAIN_TEXT = """
a an and anterior at axial background benign brain breast bus busi central centre class contrast coronal cyst deep
elongated enhancement fat finding from glandular gray grey image in inferior irregular large lateral left lesion level
lobulated lower malignant mass matter medial medium middle midline mri muscle no normal of on oval paramedian posterior
right round sagittal scan scanner shadow showing skin slice small smooth spiculated superior the tissue tumor tumour
ultrasound upper view weighted white with without
"""


def words_of(texts: Iterable[str]) -> list[str]:
    """Return the distinct words of texts, sorted, in lower case and without digits, as in CLIP."""
    pattern = re.compile(r"[^\W\d_]+")
    return sorted({word for text in texts for word in pattern.findall(text.lower()) if word.isascii()})


def train_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return the merges of a byte pair encoding in which each word becomes a single token.

    Sennrich et al., Neural Machine Translation of Rare Words with Subword Units (ACL 2016). The
    most frequent pair is merged first, ties in alphabetical order, until no pair is left. The same
    words give the same merges, which the multi-threaded trainer of `tokenizers` does not guarantee.
    """
    spellings = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merged(spelling, best) for spelling in spellings]
    return merges


def _merged(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    """Return a spelling with every occurrence of a pair merged, from left to right."""
    joined: list[str] = []
    for piece in spelling:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def write_tokenizer(folder: Path, texts: Iterable[str], model_max_length: int) -> CLIPTokenizer:
    """Write a tokenizer folder and return the tokenizer.

    Args:
        folder: where to write `vocab.json`, `merges.txt`, `tokenizer_config.json` and
            `tokenizer.json`; created if missing.
        texts: the prompts to cover besides `DOMAIN_TEXT`.
        model_max_length: number of tokens that prompts are padded or truncated to, with start and
            end token.
    """
    merges = train_merges(words_of([DOMAIN_TEXT, *texts]))
    tokens = [*CHARACTERS, *(character + WORD_END for character in CHARACTERS), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=model_max_length).save_pretrained(folder)
    write_clip_files(folder, vocabulary, merges)
    return read_tokenizer(folder, "tokenizer")


def write_clip_files(folder: Path, vocabulary: dict[str, int], merges: Iterable[tuple[str, str]]) -> None:
    """Write CLIP's two files, which transformers 5 no longer writes and transformers 4 needs."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
