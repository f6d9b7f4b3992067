"""A small shapes world, generated once, and the refusal of bad input."""

from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.__main__ import main
from tests.unit.preprocessing.helpers import IMAGES


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw files of a shapes world of 60 + 16 + 24 images and 48 + 16 + 24 statements."""
    folder = tmp_path_factory.mktemp("shapes") / "raw"
    counts = [word for split, count in IMAGES.items() for word in (f"--{split}", str(count))]
    counts += ["--nlvr-train", "48", "--nlvr-dev", "16", "--nlvr-test", "24"]
    assert main(["shapes", "--out", str(folder), "--seed", "3", *counts]) == 0
    return folder


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with exit code 2 and one line on stderr; gives that line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's way out
            code = error.code
        message = capsys.readouterr().err
        assert code == 2, message
        assert message.count("\n") == 1 and "Traceback" not in message
        return message

    return run
