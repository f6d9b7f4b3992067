"""`python -m preprocessing tokenizer train | inspect`."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from preprocessing.errors import UserError, printable
from preprocessing.formats.lines import MAX_LINE, CutFile, open_text, read_lines
from preprocessing.running.storage import storage_path
from preprocessing.shards.reader import read_texts
from preprocessing.text.tokenizer import FILE_NAME, Tokenizer, train_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands of `tokenizer`."""
    commands = parser.add_subparsers(dest="tokenizer_command", required=True, metavar="train|inspect")
    train = commands.add_parser("train", help="train lower-casing byte-level BPE")
    train.add_argument(
        "--data", nargs="+", default=[], metavar="DIR", help="prepared data sets: their train splits' texts"
    )
    train.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="text files, a text a line; .gz is unpacked"
    )
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="at most N tokens, at least 261")
    train.add_argument("--out", required=True, metavar="DIR", help=f"folder to write {FILE_NAME} to")
    train.add_argument("--overwrite", action="store_true", help=f"replace an existing {FILE_NAME}")
    inspect = commands.add_parser("inspect", help="show how a tokenizer splits a text")
    inspect.add_argument("tokenizer", metavar="FOLDER", help="folder or file of a tokenizer: README.md names the kinds")
    inspect.add_argument("text", metavar="TEXT")


def run(args: argparse.Namespace) -> None:
    """Train or inspect. Raises UserError on bad input."""
    if args.tokenizer_command == "inspect":
        _inspect(Tokenizer.load(args.tokenizer), args.text)
        return
    if not args.data and not args.text:
        raise UserError("--data or --text: give one of them, or there is nothing to train on")
    file = Path(args.out) / FILE_NAME
    if file.exists() and not args.overwrite:
        raise UserError(f"{file}: exists; give --overwrite to replace it, or another --out")
    tokenizer = train_tokenizer(_texts(args), args.vocab_size)
    tokenizer.save(args.out)
    fewer = "" if tokenizer.vocab_size == args.vocab_size else f" of {args.vocab_size}: the texts hold no more"
    print(f"{file}: {tokenizer.vocab_size} tokens{fewer}")


def _texts(args: argparse.Namespace) -> Iterator[str]:
    for directory in args.data:
        yield from read_texts(storage_path(directory))
    for name in args.text:
        yield from _lines(Path(name))


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with open_text(path) as file:
            for number, (_, line) in enumerate(read_lines(file), 1):
                if line is None:
                    raise UserError(f"{path}: line {number}: has more than {MAX_LINE >> 20} MiB; break it into lines")
                if text := line.decode().strip():
                    yield text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check --text") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number}: is not UTF-8 text ({error}); check --text") from None
    except CutFile as error:
        raise UserError(f"{path}: line {error.line}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check --text") from None


def _inspect(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, max_length=1 << 20)
    names = ("pad", "unk", "cls", "sep", "mask")
    special = ", ".join(f"{name} {index}" for name, index in zip(names, tokenizer.special_ids, strict=True))
    print(f"{tokenizer.path}: {tokenizer.vocab_size} tokens; {special}")
    for index, token in zip(ids, tokenizer.tokens(ids), strict=True):
        print(f"{index:>8}  {printable(token)}")
    print(printable(f"{len(ids)} tokens; back to text: {tokenizer.decode(ids)}"))
