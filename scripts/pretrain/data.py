"""Text for training: collected, deduplicated, split by document, as tokens in two files.

    python scripts/pretrain/data.py --out results/pretrain/text     # what this machine carries
    python scripts/pretrain/data.py --out results/pretrain/mine --data mine.jsonl

``--data`` takes text and JSONL, compressed by gzip or not, and Parquet. Without it the script reads the
English documentation of installed packages: /usr/share/doc, man and info pages, dictionaries and books of a
Linux distribution, Python's documentation topics and docstrings. ``sources.json`` lists each package with its
licence. All text is held in memory at once.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import html.parser
import itertools
import json
import math
import random
import re
import subprocess
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

RUN_LINES = 3  # so many lines in a row that stood in an earlier document are left out
SHORTEST = 200  # characters of a document
LONGEST = 200_000  # characters of a document of the distribution: books and dictionaries are several
LARGEST_BYTES = 64 << 20  # of a file of the distribution
COMMON_WORDS = frozenset(
    [
        "the",
        "of",
        "to",
        "and",
        "a",
        "in",
        "is",
        "that",
        "for",
        "it",
        "with",
        "as",
        "be",
        "this",
        "are",
        "or",
        "by",
        "on",
    ]
)
BYTES_SEPARATOR = 256
# Of man pages, by their names in roff.
SIGNS = {"em": "--", "en": "-", "aq": "'", "Aq": "'", "bu": "*", "lq": '"', "rq": '"', "oq": "'", "cq": "'"}
SEPARATOR = "<|document|>"


class DataError(ValueError):
    """Text that can't be had or used."""


@dataclass(frozen=True)
class Document:
    """A text and the package that it comes from."""

    text: str
    source: str


# --- reading ----------------------------------------------------------------------------------------------


class _Html(html.parser.HTMLParser):
    """The text of a page, without what is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in ("script", "style", "nav")
        if tag in ("p", "div", "li", "tr", "br", "pre", "h1", "h2", "h3", "h4", "dt", "dd"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "nav")

    def handle_data(self, data: str) -> None:
        if self.hidden <= 0:
            self.parts.append(data)


def plain_html(text: str) -> str:
    parser = _Html()
    parser.feed(text)
    return "".join(parser.parts)


def plain_man(text: str) -> str:
    """A man page's words: fonts and macros go, arguments of headings and fonts stay."""
    lines = []
    for line in text.splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].strip().partition(" ")
            if not re.fullmatch("S[HShs]|[BIR]{1,2}|N[md]", macro):
                continue
            line = rest.replace('"', "")
        line = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[+-]?\d|\\[&|^/,:]", "", line)
        line = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[+-]?\d|\\[&|^/,:]", "", line)
        line = re.sub(r"\\\*?\((..)|\\\[(\w+)\]", lambda m: SIGNS.get(m[1] or m[2], ""), line)
        lines.append(line.replace("\\-", "-").replace("\\e", "\\"))
    return "\n".join(lines)


def plain_pod(text: str) -> str:
    """Perl's documentation without its commands, formats and code."""
    parts = re.split(r"^=(\w+)[ \t]*(.*)$", text, flags=re.MULTILINE)
    shown = []
    for command, heading, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if command.startswith(("head", "item")):
            shown.append(heading)
        if command not in ("cut", "for", "begin", "encoding"):
            shown.append(body.strip("\n"))
    plain = re.sub(r"[XZ]<[^<>]*>", "", "\n\n".join(filter(None, shown)))
    return re.sub(r"[BCFILS]<+ ?([^<>]*?) ?>+", r"\1", plain)


def _read_text(path: Path) -> str | None:
    """A file's text; None where it is none. A byte in a thousand that is no UTF-8 is left out."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            return None
        raw = path.read_bytes()
        if path.name.endswith((".gz", ".dz")):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error):
        return None
    text = raw.decode(errors="ignore")
    return text.replace("\r\n", "\n") if len(text.encode()) >= 0.999 * len(raw) and "\0" not in text else None


def is_english(text: str) -> bool:
    words = re.findall(r"[a-z]+", text.lower())
    if len(words) < 30 or sum(map(str.isascii, text)) < 0.97 * len(text):
        return False
    return sum(word in COMMON_WORDS for word in words) > 0.12 * len(words)


def _packages(root: Path) -> dict[str, str]:
    """Which package of a Debian-like distribution owns a file."""
    owners = {}
    for listing in sorted((root / "var/lib/dpkg/info").glob("*.list")):
        package = listing.stem.partition(":")[0]
        for line in (_read_text(listing) or "").splitlines():
            owners[line] = package
    return owners


def _distribution(root: Path) -> Iterator[Document]:
    owners = _packages(root)
    folders = {
        "usr/share/doc": plain_html,
        "usr/share/gtk-doc": plain_html,
        "usr/share/info": None,
        "usr/share/perl": plain_pod,
        "usr/share/dictd": None,
        "usr/share/games/fortunes": None,
        **{f"usr/share/man/man{section}": plain_man for section in range(1, 10)},
    }
    for folder, plain in folders.items():
        for path in sorted((root / folder).rglob("*")):
            name = path.name.removesuffix(".gz").removesuffix(".dz").lower()
            if path.is_symlink() or not path.is_file() or name.startswith(("changelog", "copyright")):
                continue
            if folder.endswith("doc"):
                if not re.search(
                    r"\.(txt|html?|md|rst|xml|adoc|pod|tex)$|^(readme|news|faq|howto|intro)", name
                ):
                    continue
            elif folder.endswith("perl") and not name.endswith(".pod"):
                continue
            text = _read_text(path)
            if text is None:
                continue
            if plain in (plain_man, plain_pod) or (
                plain is plain_html and re.search(r"\.(html?|xml)$", name)
            ):
                text = plain(text)
            inside = path.relative_to(root).parts
            owner = owners.get("/" + "/".join(inside)) or (inside[3] if folder.endswith("doc") else folder)
            yield Document(text, owner)


def _python() -> Iterator[Document]:
    """Python's documentation topics, and the docstrings of a module of its library as one document."""
    from pydoc_data.topics import topics

    yield from (Document(text, "python") for text in topics.values())
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            tree = ast.parse(_read_text(path) or "")
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield Document("\n\n".join(filter(None, strings)), "python")


def _king_james(root: Path) -> Iterator[Document]:
    """Debian's bible-kjv, whose text its program reads."""
    program, folder = root / "usr/bin/bible", root / "usr/lib"
    if program.exists() and (folder / "bible.data").exists():
        command = [str(program), "-p", str(folder), "gen1:1-rev22:21"]
        printed = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        yield Document(printed.stdout, "bible-kjv-text")


def _pieces(document: Document) -> Iterator[Document]:
    """A document, cut at empty lines where it is longer than `LONGEST`."""
    part: list[str] = []
    length = 0
    for paragraph in re.split(r"\n\s*\n", document.text):
        part.append(paragraph)
        length += len(paragraph)
        if length > LONGEST:
            yield Document("\n\n".join(part), document.source)
            part, length = [], 0
    yield Document("\n\n".join(part), document.source)


def collect(root: Path) -> Iterator[Document]:
    """English documents below a file system's root, and of the running Python where that is ``/``."""
    sources = [_distribution(root), _king_james(root), _python() if root == Path("/") else ()]
    for document in itertools.chain(*sources):
        yield from (piece for piece in _pieces(document) if is_english(piece.text))


def _licence(package: str, root: Path) -> str:
    if package == "python":
        return "PSF-2.0"
    text = _read_text(root / "usr/share/doc" / package / "copyright")
    if text is None:
        return "not stated by the distribution"
    named = dict.fromkeys(
        match.strip() for match in re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)
    )
    return ", ".join(named) or f"see {root / 'usr/share/doc' / package / 'copyright'}"


def _text_of(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place} is no text, but {value!r:.40}")
    # Half of a surrogate pair, which JSON can hold and UTF-8 can't.
    return value.encode(errors="replace").decode()


def _open_text(path: Path) -> IO[str]:
    """Text in UTF-8, with a byte order mark or without, compressed or not."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig")


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON object with a field {field!r}") from error
            if value is not None:
                yield _text_of(value, f"{path}, line {number}: field {field!r}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
        if field not in table.schema_arrow.names:
            raise DataError(f"{path} has no column {field!r}, but {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=[field]):
            for value in batch[field].to_pylist():
                if value is not None:
                    yield _text_of(value, f"{path}: column {field!r}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is damaged, or no Parquet: {error}") from error


def _read_whole(path: Path, field: str) -> Iterator[str]:
    with _open_text(path) as file:
        yield file.read()


_READERS = {".txt": _read_whole, ".md": _read_whole, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
_KINDS = ".txt, .md, .jsonl (each also as .gz) or .parquet"


def _reader_of(path: Path) -> Callable[[Path, str], Iterator[str]] | None:
    """By a file's name."""
    name = path.name.lower()
    inner = name.removesuffix(".gz")
    reader = _READERS.get(Path(inner).suffix)
    return None if reader is _read_parquet and inner != name else reader


def read(paths: Iterable[Path], field: str) -> Iterator[Document]:
    """Documents of ``.txt``/``.md`` (a file each), ``.jsonl`` and ``.parquet`` files, or of folders of these.

    Text and JSONL may be compressed by gzip. A row without a text (null) is no document.

    Raises
    ------
    DataError
        A file that is missing, damaged, of another kind or encoding, or without the field; Parquet without
        pyarrow.
    """
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _reader_of(p) and not p.is_dir())
            if not inside:
                raise DataError(f"{path} has no {_KINDS} files")
            yield from read(inside, field)
            continue
        if not path.exists():
            raise DataError(f"there is no {path}")
        reader = _reader_of(path)
        if reader is None:
            raise DataError(f"{path}: a document is {_KINDS}")
        try:
            for text in reader(path, field):
                yield Document(text, path.name)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is no UTF-8 (byte {error.object[error.start]:#04x}): convert it, by iconv -f LATIN1 "
                "-t UTF-8, say"
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} can't be read: {error}") from error


# --- deduplication and split ------------------------------------------------------------------------------


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")


def _key(text: str) -> int:
    return _digest(" ".join(text.split()))


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Each document once, without runs of `RUN_LINES` lines that stand in an earlier one.

    Lines are compared by their words; empty ones don't count. What is left and short is left out.
    """
    whole: set[int] = set()
    runs: set[int] = set()
    for document in documents:
        key = _key(document.text)
        if key in whole:
            continue
        whole.add(key)
        lines = document.text.splitlines()
        keys = [(place, _key(line)) for place, line in enumerate(lines) if line.strip()]
        dropped: set[int] = set()
        own = set()
        for first in range(len(keys) - RUN_LINES + 1):
            window = keys[first : first + RUN_LINES]
            run = hash(tuple(line for _, line in window))
            own.add(run)
            if run in runs:
                dropped.update(place for place, _ in window)
        runs |= own
        text = "\n".join(line.rstrip() for place, line in enumerate(lines) if place not in dropped)
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        if len(text) >= SHORTEST:
            yield Document(text, document.source)


def split(documents: Iterable[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, by their contents and in an order of their contents.

    Raises
    ------
    DataError
        One of the two is empty.
    """
    kept = sorted(((_key(document.text), document) for document in documents), key=lambda pair: pair[0])
    random.Random(0).shuffle(kept)
    count = max(1, round(share * len(kept)))
    if count >= len(kept):
        raise DataError(
            f"{len(kept)} documents of at least {SHORTEST} characters are left after deduplication, too few "
            f"to train on some and hold {share:.0%} out: give more files, or JSONL with a document a line"
        )
    texts = [document for _, document in kept]
    return texts[count:], texts[:count]


# --- tokens -----------------------------------------------------------------------------------------------


def _train_bpe(documents: list[Document], vocabulary: int, out: Path) -> Any:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise DataError(
            "a BPE tokenizer needs the package tokenizers; --tokenizer bytes needs none"
        ) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    # A separator in a text is text: it would begin another document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encode(documents: list[Document], tokenizer: Any, separator: int) -> NDArray[np.integer]:
    """All documents, each behind a separator."""
    parts: list[NDArray[np.integer]] = []
    for first in range(0, len(documents), 256):
        texts = [document.text for document in documents[first : first + 256]]
        if tokenizer is None:
            rows: list[Any] = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        else:
            rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for row in rows:
            parts += [np.array([separator]), np.asarray(row)]
    return np.concatenate(parts)


def prepare(
    documents: Iterable[Document],
    out: Path,
    *,
    tokenizer: str = "bpe",
    vocabulary: int = 8192,
    held_out: float = 0.02,
    root: Path = Path("/"),
) -> dict[str, Any]:
    """Write ``train.bin``, ``held_out.bin``, ``sources.json`` and ``meta.json``, which it returns.

    A run that reads the folder's earlier tokens keeps them; ``meta.json`` is there only beside its tokens.
    """
    if not 0 < held_out < 1:
        raise DataError(f"the held-out share is between 0 and 1, got {held_out}")
    if tokenizer == "bpe" and vocabulary <= BYTES_SEPARATOR:
        raise DataError(
            f"a vocabulary has all bytes and a separator, {BYTES_SEPARATOR + 1}, got {vocabulary}"
        )
    parts = dict(zip(("train", "held_out"), split(deduplicate(documents), held_out), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)
    bpe = _train_bpe(parts["train"], vocabulary, out) if tokenizer == "bpe" else None
    separator = BYTES_SEPARATOR if bpe is None else bpe.token_to_id(SEPARATOR)
    size = 257 if bpe is None else bpe.get_vocab_size()
    kind = np.uint16 if size <= 2**16 else np.uint32
    meta: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocabulary": size,
        "separator": separator,
        "dtype": np.dtype(kind).name,
    }
    digest = hashlib.sha256()
    for name, part in parts.items():
        tokens = _encode(part, bpe, separator).astype(kind)
        partial = out / f"{name}.partial"
        partial.write_bytes(tokens.tobytes())
        partial.replace(out / f"{name}.bin")
        digest.update(tokens.tobytes())
        size_bytes = sum(len(document.text.encode()) for document in part)
        meta[name] = {"documents": len(part), "tokens": len(tokens), "bytes": size_bytes}
    meta["sha256"] = digest.hexdigest()
    sources = Counter[str]()
    for part in parts.values():
        for document in part:
            sources[document.source] += len(document.text)
    listing = [
        {"source": source, "characters": count, "licence": _licence(source, root)}
        for source, count in sources.most_common()
    ]
    (out / "sources.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    partial = out / "meta.partial"
    partial.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    partial.replace(out / "meta.json")
    return meta


# --- batches ----------------------------------------------------------------------------------------------


class Tokens:
    """Tokens of one part of a prepared folder, in windows of ``context + 1``.

    Which windows a step sees follows from the seed and its number alone, so that a run goes on anywhere.
    """

    def __init__(self, folder: Path, part: str, context: int, seed: int = 0) -> None:
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.tokens = np.memmap(folder / f"{part}.bin", dtype=self.meta["dtype"], mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder} holds no tokens ({error}); make them with "
                f"python scripts/pretrain/data.py --out {folder}"
            ) from error
        expected = self.meta[part]["tokens"]
        if len(self.tokens) != expected:
            raise DataError(
                f"{folder / part}.bin has {len(self.tokens)} tokens, and meta.json says {expected}: copy the "
                "folder again, or make it anew with python scripts/pretrain/data.py"
            )
        self.context, self.seed = context, seed
        self.windows = (len(self.tokens) - 1) // context
        if self.windows < 1:
            raise DataError(
                f"{folder}: {part} has {len(self.tokens)} tokens, fewer than a context of {context}"
            )
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def _window(self, index: int) -> NDArray[np.int64]:
        begin = index * self.context
        return np.asarray(self.tokens[begin : begin + self.context + 1], dtype=np.int64)

    def first(self, count: int) -> NDArray[np.int64]:
        """The first windows, at most `count`: ``(count, context + 1)``."""
        return np.stack([self._window(index) for index in range(min(count, self.windows))])

    def at(self, place: int, count: int) -> NDArray[np.int64]:
        """The windows at `place` and after it in an order that is another one in each epoch."""
        rows = []
        for number in range(place, place + count):
            epoch, within = divmod(number, self.windows)
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows)
            rows.append(self._window(int(self._order[1][within])))
        return np.stack(rows)

    def positions(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Each input's position in its document, ``(B, context)``: 0 at separators and a window's start."""
        inputs = windows[:, :-1]
        place = np.arange(inputs.shape[1])
        starts = np.where(inputs == self.meta["separator"], place, 0)
        return place - np.maximum.accumulate(starts, axis=1)

    def bytes_per_token(self) -> float:
        part = self.meta["held_out"]
        return part["bytes"] / part["tokens"] if part["tokens"] else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", help="files or folders: text, JSONL, Parquet")
    parser.add_argument("--field", default="text", help="of JSONL and Parquet")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="of the file system that is read without --data"
    )
    parser.add_argument("--tokenizer", choices=("bpe", "bytes"), default="bpe")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the BPE tokenizer")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the documents")
    arguments = parser.parse_args()
    documents = read(arguments.data, arguments.field) if arguments.data else collect(arguments.root)
    try:
        meta = prepare(
            documents,
            arguments.out,
            tokenizer=arguments.tokenizer,
            vocabulary=arguments.vocabulary,
            held_out=arguments.held_out,
            root=arguments.root,
        )
    except (DataError, OSError) as error:
        sys.exit(str(error))
    print(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()
