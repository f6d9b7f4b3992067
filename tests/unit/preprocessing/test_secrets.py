"""Passwords and keys in addresses: refused before anything is written, and printed nowhere."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation import common, nlvr
from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.engine import setup
from eve_ds.errors import exit_code
from preprocessing.__main__ import main
from preprocessing.errors import UserError, id_without_secrets, without_secrets
from tests.support.foreign_shards import table_of, write_arrow
from tests.support.shards import tiny_tokenizer
from tests.unit.preprocessing.helpers import image_of, rows_of, write_json

ADDRESSES = {
    "s3://AKIAX:sEcReT/x+y@bucket/folder": "s3://***@bucket/folder",
    "s3://:sEcReT@bucket/folder": "s3://***@bucket/folder",
    "s3://sEcReT@bucket": "s3://***@bucket",
    "s3://u:1/sEcReT@bucket/a": "s3://***@bucket/a",
    "gs://u:sEcReT@bucket": "gs://***@bucket",
    "hdfs://u:sEcReT@nn:8020/a": "hdfs://***@nn:8020/a",
    "s3://bucket/a?secret_key=sEcReT&region=eu": "s3://bucket/a?secret_key=***&region=eu",
    "https://h/a.jpg?X-Amz-Signature=sEcReT&w=1": "https://h/a.jpg?X-Amz-Signature=***&w=1",
    "http://u:sEcReT@proxy:80/": "http://***@proxy:80/",
    "s3:/AKIAX:sEcReT/x+y@bucket/folder": "s3:/***@bucket/folder",
    "s3:/sEcReT@bucket": "s3:/***@bucket",
    "s3:///AKIAX:sEcReT@bucket": "s3:///***@bucket",
    "https:/u:sEcReT@h/a": "https:/***@h/a",
    "https://h/a?AWSAccessKeyId=sEcReT&Signature=sEcReT": "https://h/a?AWSAccessKeyId=***&Signature=***",
    "s3://bucket/a?endpoint_override=u:sEcReT@h:9000&region=eu": "s3://bucket/a?endpoint_override=***@h:9000&region=eu",
    "s3://bucket/a?endpoint_override=http://u:sEcReT@h": "s3://bucket/a?endpoint_override=http://***@h",
    "https://h/a?id=1&API-KEY=sEcReT&Key-Pair-Id=sEcReT": "https://h/a?id=1&API-KEY=***&Key-Pair-Id=***",
    "https://h/a?x-amz-credential=sEcReT%2Fa&token=sEcReT": "https://h/a?x-amz-credential=***&token=***",
}
SOUND = [
    "s3://bucket/a@b/c:d@e",
    "hdfs://hadoop@nn:8020/a",
    "hdfs://nn:8020/a@b",
    "http://host:80/a@b",
    "a:b@c",
    "s3://bucket/a?region=eu&scheme=http",
    "/data/k=v?x=y",
    "/data/s3:a@b/c:d@e",
    "s3://bucket/a?endpoint_override=host:9000&region=eu",
    "https://img.host.org/view?designId=7&signal=1&keyword=a&monkey=2&tokens=3&passwords=no",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_secrets_are_hidden(address: str) -> None:
    assert without_secrets(f"x '{address}' y") == f"x '{ADDRESSES[address]}' y"
    assert without_secrets(f"{ADDRESSES[address]}: y") == f"{ADDRESSES[address]}: y"  # a message hidden before
    one = id_without_secrets(address)
    assert "sEcReT" not in one and one != id_without_secrets(address.replace("sEcReT", "sEcReT2"))
    assert id_without_secrets(one) == one and without_secrets(f"'{one}', {one}: {one}.") == f"'{one}', {one}: {one}."
    hidden = common.without_secrets(f"x {address}")
    assert "sEcReT" not in hidden and hidden.startswith("x ")


def test_keys_in_names_of_files_that_were_fetched_are_hidden_in_messages() -> None:
    name = "/data/a.json?w=1&X-Amz-Signature=sEcReT"
    for hide in (without_secrets, common.without_secrets):
        assert hide(f"{name} is empty") == "/data/a.json?w=1&X-Amz-Signature=*** is empty"
        assert hide("nope?run=3&fold=2.csv: no such file") == "nope?run=3&fold=2.csv: no such file"
    assert id_without_secrets(name) == name  # ids of sets that were prepared before stay the same


@pytest.mark.parametrize("address", SOUND)
def test_text_without_secrets_is_unchanged(address: str) -> None:
    assert without_secrets(address) == address


def test_long_texts_take_no_longer_for_it() -> None:
    start = time.process_time()
    for text in ("s3://" * 20_000, "s3://" + "a:" * 50_000, "s3://x?" + "key" * 50_000, "s3://x" + "?k" * 50_000):
        assert without_secrets(text) == text
    assert time.process_time() - start < 20  # a fraction of a second; a pattern that backtracks takes minutes


HIDDEN = "s3://***b431f7f3e2eacd5e@b/2"  # k:sEcReT
OPTIONS = {
    "out": "json --task retrieval --annotations A --images I --split train --out URI",
    "images": "json --task retrieval --annotations A --images URI --split train --out O",
    "annotations": "json --task retrieval --annotations URI --images I --split train --out O",
    "lines": "cc3m --annotations URI --images I --split train --out O",
    "img2dataset": "img2dataset --images URI --split train --out O",
    "exclude": "json --task retrieval --annotations A --exclude URI --images I --split train --out O",
    "exclude-images-of": "cc3m --annotations A --exclude-images-of URI --images I --split train --out O",
    "usage": "json --task URI",
    "unknown": "json --task nlvr --annotations A --images I --split train --out O URI --what",
    "verify": "verify URI",
    "tokenizer": "tokenizer train --data URI --vocab-size 300 --out O",
    "duplicates": "duplicates hash URI --out O.npz",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_no_command_prints_them(
    tmp_path: Path, refuse: Callable[..., str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0.jpg").write_bytes(image_of(0))
    write_json(tmp_path / "a.json", [{"image": "0.jpg", "caption": "a"}])
    names = {"A": tmp_path / "a.json", "I": tmp_path, "O": tmp_path / "out", "O.npz": tmp_path / "o.npz"}
    for address, shown in list(ADDRESSES.items())[:7]:
        words = [names.get(word, address if word == "URI" else word) for word in OPTIONS[option].split()]
        message = refuse(*words)
        assert "sEcReT" not in message and "sEcReT" not in capsys.readouterr().out
        if option not in ("usage", "unknown"):
            assert f"{shown}: holds a user, a password or a key" in message and "AWS_SECRET_ACCESS_KEY" in message
    assert not (tmp_path / "out/train").exists()


def test_records_with_signed_addresses_stand_in_the_manifest_without_them(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(image_of(0))
    records = [
        {"image": name, "caption": "a"} for name in ("0.jpg", "https://h/1.jpg?sig=sEcReT", "s3://k:sEcReT@b/2.jpg")
    ]
    words = ["json", "--task", "retrieval", "--annotations", write_json(tmp_path / "a.json", records), "--images",
             tmp_path, "--split", "train", "--out", tmp_path / "out", "--max-dropped", 0.9]  # fmt: skip
    assert main([f"{word}" for word in words]) == 0
    for name in ("manifest.json", "provenance.json"):
        assert "sEcReT" not in (tmp_path / "out/train" / name).read_text()
    items = json.loads((tmp_path / "out/train/manifest.json").read_text())["dropped_items"]
    assert [item["item"] for item in items] == ["https://h/1.jpg?sig=***", "s3://***@b/2.jpg"]


def test_ids_that_are_addresses_stand_nowhere_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the images lie in folders called as their addresses are."""
    address = "s3://k:sEcReT@b/2.jpg"
    path = tmp_path / "images" / address
    path.parent.mkdir(parents=True)
    path.write_bytes(image_of(2))
    (tmp_path / "lines.token").write_text(f"{address}#0\ta\n")
    (tmp_path / "answers.json").write_text('["yes"]')
    question = {"image": address, "question": "q", "question_id": 1, "answer": "yes"}
    pair = {"images": [address] * 2, "sentence": "s", "label": "True", "identifier": f"{address}-0"}
    end = ["--images", f"{tmp_path}/images", "--split", "train", "--out"]
    answers = ["--answer-list", f"{tmp_path}/answers.json"]
    commands = {
        "retrieval": ["json", "--task", "retrieval", "--annotations"],
        "vqa": ["json", "--task", "vqa", *answers, "--annotations"],
        "nlvr": ["json", "--task", "nlvr", "--annotations"],
        "flickr": ["flickr30k", "--annotations"],
    }
    records = {"retrieval": {"image": address, "caption": "a"}, "vqa": question, "nlvr": pair}
    for name, words in commands.items():
        annotations = write_json(tmp_path / f"{name}.json", [records[name]]) if name in records else "lines.token"
        out = tmp_path / "out" / name
        assert main([*words, f"{tmp_path / annotations}", *end, f"{out}"]) == 0
        (row,) = rows_of(out / "train")
        one = row["image_id"] if name != "nlvr" else row["identifier"][0]
        assert one.startswith(HIDDEN) and id_without_secrets(address).startswith(HIDDEN)
        for check in (["inspect", f"{out}", "--html", f"{out}/page.html"], ["verify", f"{out}"]):
            assert main(check) == 0
        of = ["--of", f"{out}/train", "--out", f"{out}/list.json", "--html", f"{out}/pairs.html"]
        assert main(["duplicates", "find", f"{out}/train", *of]) == 0
        assert HIDDEN in (out / "pairs.html").read_text()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"sEcReT" in path.read_bytes()]
    shown = capsys.readouterr()
    assert HIDDEN in shown.out and "sEcReT" not in shown.out + shown.err


def test_images_whose_names_differ_by_them_stay_apart_and_are_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["https://h/view?designId=1", "https://h/view?designId=2", "https://h/view?w=9&key=1", "s3://a:b@c/3"]
    names += ["https://h/view?w=9&key=2", "s3://a:c@c/4", "plain.jpg"]
    for number, name in enumerate([*names, "rest.jpg"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_of(number))
    records = [{"image": name, "caption": "a"} for name in [*names, "rest.jpg"]]
    some, every = write_json(tmp_path / "some.json", records[:7]), write_json(tmp_path / "all.json", records)
    words = ["json", "--task", "retrieval", "--images", f"{tmp_path}/images", "--split", "train"]
    assert main([*words, "--annotations", f"{some}", "--out", f"{tmp_path}/one"]) == 0
    ids = [row["image_id"] for row in rows_of(tmp_path / "one/train")]
    assert len(set(ids)) == 7 and ids[:2] == names[:2] and ids[-1] == "plain.jpg"
    train, pairs = f"{tmp_path}/one/train", f"{tmp_path}/pairs.json"
    assert main(["duplicates", "find", train, "--of", train, "--out", pairs]) == 0
    (tmp_path / "raw.txt").write_text("\n".join(names))
    (tmp_path / "bases.txt").write_text("\n".join(name.rpartition("/")[2] for name in names))
    for excluded in (pairs, f"{tmp_path}/raw.txt", f"{tmp_path}/bases.txt"):
        capsys.readouterr()
        end = ["--annotations", f"{every}", "--out", f"{tmp_path}/two", "--exclude", excluded, "--overwrite"]
        assert main([*words, *end]) == 0 and [row["image_id"] for row in rows_of(tmp_path / "two/train")] == [
            "rest.jpg"
        ]
        assert f"--exclude {excluded}: 7 of 7 images found" in capsys.readouterr().out


def test_ids_in_shards_of_others_are_hidden(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"image": image_of(1), "caption": ["a"], "image_id": "s3://k:sEcReT@b/1.jpg", "split": "train"}
    for name in ("a_train", "b_train"):
        write_arrow(tmp_path / f"{name}.arrow", table_of([row]))
    config = PretrainConfig()
    config.data.path, config.data.allow_overlap = str(tmp_path), True
    samples = setup.build_dataset(config, "train", tiny_tokenizer(), train=True)
    setup.check_apart(config, samples, {})
    assert "such as image_id s3://***@b/1.jpg" in caplog.messages[0]


def test_training_refuses_them_in_settings(capsys: pytest.CaptureFixture[str]) -> None:
    address = "s3://k:sEcReT@bucket/data"
    for root, key in (
        (PretrainConfig, "output_dir"),
        (FinetuneConfig, "data.path"),
        (PretrainConfig, "data.tokenizer"),
    ):
        with pytest.raises(UserError) as caught:
            parse(root, [f"--{key}={address}"], "eve")
        assert f"{key}=s3://***@bucket/data: holds a user, a password or a key" in str(caught.value)

    def fails() -> None:
        raise UserError(f"{address}: no such file")

    assert exit_code(fails) == 2
    assert capsys.readouterr().err == "error: s3://***@bucket/data: no such file\n"


def test_evaluation_prints_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = "s3://k:sEcReT@bucket/predictions.csv"
    words = ["--predictions", address, "--annotations", address + "x", "--out", f"{tmp_path}/m.json"]
    assert common.run(nlvr.main, words) == 2
    with pytest.raises(SystemExit):
        nlvr.main([*words, address])
    shown = capsys.readouterr()
    assert "sEcReT" not in shown.err + shown.out and "s3://***@bucket/predictions.csv" in shown.err


def test_lines_that_messages_cut_are_hidden_first(tmp_path: Path, refuse: Callable[..., str]) -> None:
    address = f"s3://AKIA:{'sEcReT' * 20}@bucket/a"
    (tmp_path / "a.csv").write_text(f"image,caption,{address}\nno caption\n")
    words = ["flickr30k", "--images", tmp_path, "--split", "train", "--out", tmp_path / "out", "--annotations"]
    message = refuse(*words, tmp_path / "a.csv")
    assert "line 2: is not of the form of its header, 'image,caption,s3://***@bucket/a'" in message
    with pytest.raises(common.InputError, match=r"line 1: 's3://\*\*\*@bucket/a' is not"):
        (tmp_path / "p.csv").write_text(f"{address}\n")
        nlvr.read_predictions(f"{tmp_path}/p.csv")
