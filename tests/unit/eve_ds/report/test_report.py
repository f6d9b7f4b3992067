"""The page: complete, self-contained, escaped; missing parts are listed; a bad folder is a one-line error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from evaluation.common import run
from eve_ds.report.__main__ import build, main
from eve_ds.report.run_files import read_run
from eve_ds.weights.model_folder import metadata
from tests.support.made_run import make_run
from tests.support.page import Page


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "demo")


def forget_curves(folder: Path, but: str = "") -> None:
    """For what is not about them: 15 charts take most of a page's time. One stage may keep its own."""
    for stage in folder.glob("*/metrics.jsonl"):
        if stage.parent.name != but:
            stage.unlink()


@pytest.fixture
def without_curves(run_folder: Path) -> Path:
    forget_curves(run_folder)
    return run_folder


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(make_run(tmp_path_factory.mktemp("whole") / "demo"))


def test_the_page_has_all_records(content: str) -> None:
    page = Page(content)
    how = "on 2 processes (ZeRO stage 2, experts distributed over 2); its loss went from 4.1 to 1.2, 29% of its initial"
    scores = ["71.5", "0.5", "78.3", "21.0", "41.7", "74.2", "50.0", "31.1", "55.0", "60.4", "58.7", "66.8", "19.3"]
    samples = ["yes/no", "a caption about 9", "both pictures have a circle", "what color is shape 1?"]
    titles = ["Masked patches: loss", "Masked words: loss", "Learning rate", "Samples per second", "Contrastive loss"]
    for text in (how, "+17.9", *(f"{score}\xa0%" for score in scores), *samples, *titles, "2 min 10 s in total"):
        assert text in page.text
    assert page.count("img") == 6 * 3 + 3 * 5 + 2 + 4 + 4 * 2
    assert page.count("svg") == 7 + 8 + 5 + 6
    hits = [a for name, a in page.tags if name == "figure" and a.get("class") == "hit"]
    assert len(hits) == 2  # of three captions one does not find its image
    assert page.missing() == 3  # the configs of the three stages that have none


def rows(content: str) -> list[list[str]]:
    """The cells of the table of scores, its head first."""
    table = content[content.index('<section id="scores">') :].split("<table>")[1].split("</table>")[0]
    return [
        [Page(cell).text for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table)
    ]


def test_scores_are_shown_with_their_baselines(content: str) -> None:
    head, *found = rows(content)
    assert head == [
        "Task",
        "Measure",
        "Score",
        "",
        "No pre-training",
        "Chance",
        "Majority",
        "Text only",
        "Above best baseline",
    ]
    assert {len(row) for row in found} == {len(head)}
    assert [[*row[:3], *row[4:]] for row in found] == [
        [text.replace("%", "\xa0%").replace("-", "\N{EN DASH}") for text in row.split("|")]
        for row in (
            "Retrieval|text R@1|71.5%|55.0%|0.5%|-|-|+16.5",
            "|text R@5|90.0%|81.2%|-|-|-|+8.8",
            "|text R@10|96.0%|89.9%|-|-|-|+6.1",
            "|image R@1|64.5%|47.3%|0.5%|-|-|+17.2",
            "|image R@5|88.0%|79.4%|-|-|-|+8.6",
            "|image R@10|95.1%|88.8%|-|-|-|+6.3",
            "VQA|accuracy|78.3%|60.4%|-|21.0%|41.7%|+17.9",
            "|yes/no|82.2%|66.6%|-|-|-|+15.6",
            "|number|70.1%|58.7%|-|-|-|+11.4",
            "|other <x>|76.0%|-|-|-|-|-",
            "NLVR|accuracy|74.2%|66.8%|50.0%|-|-|+7.4",
            "|consistency|31.1%|19.3%|-|-|-|+11.8",
        )
    ]
    assert '<i style="width: 74.2%"></i><b style="left: 66.8%"></b><b style="left: 50.0%"></b>' in content


def test_summary_and_tiles_show_the_best_baseline(content: str) -> None:
    text = Page(content).text.replace("\xa0", " ")
    for sentence in (
        "It predicts 92.1 % of held-out masked words (63.4 % with another image, 99.8 % by an oracle that knows",
        "ranks a correct caption first for 71.5 % of the images (no pre-training 55.0 %, chance 0.5 %).",
        "with an accuracy of 78.3 % (no pre-training 60.4 %, majority 21.0 %, text only 41.7 %).",
        "judges 74.2 % of the statements about image pairs correctly (no pre-training 66.8 %, chance 50.0 %).",
    ):
        assert sentence in text
    tiles = re.findall(r'"label">(.*?)</div><div class="value">(.*?)</div><div class="beside">(.*?)</div>', content)
    assert [" | ".join(tile).replace("\xa0", " ") for tile in tiles] == [
        "Pre-training loss | 1.2 | from 4.1, 351 samples/s",
        "Masked words: accuracy | 92.1 % | 63.4 % with another image, 99.8 % by an oracle",
        "Retrieval: text R@1 | 71.5 % | no pre-training 55.0 %",
        "VQA: accuracy | 78.3 % | no pre-training 60.4 %",
        "NLVR: accuracy | 74.2 % | no pre-training 66.8 %",
    ]


@pytest.mark.parametrize("other", [None, 4, {}, {"accuracy": None}, {"accuracy": True}])
def test_a_missing_baseline_is_a_dash(without_curves: Path, other: object) -> None:
    """As those made before there was one, or ones made by hand."""
    part = {"accuracy": 0.742, "chance": 0.5} | ({} if other is None else {"from_first_values": other})
    (without_curves / "metrics.json").write_text(json.dumps({"pretrain": {"words_accuracy": 0.5}, "nlvr": part}))
    content = build(without_curves)
    assert rows(content)[1][4:] == ["\N{EN DASH}", "50.0\xa0%", "\N{EN DASH}", "\N{EN DASH}", "+24.2"]
    text = Page(content).text.replace("\xa0", " ")
    assert "judges 74.2 % of the statements about image pairs correctly (chance 50.0 %)." in text
    assert "It predicts 50.0 % of held-out masked words." in text


def test_no_sentence_without_masked_words(without_curves: Path) -> None:
    (without_curves / "metrics.json").write_text(json.dumps({"pretrain": {"words_accuracy_oracle": 0.5}}))
    content = build(without_curves)
    assert "It predicts" not in content and "Masked words: accuracy" not in content


def test_a_score_below_its_baseline_has_a_negative_margin(without_curves: Path) -> None:
    part = {"overall": 40.0, "text_only_baseline": 41.7, "from_first_values": {"overall": 60.4}}
    (without_curves / "metrics.json").write_text(json.dumps({"vqa": part}))
    content = build(without_curves)
    assert rows(content)[1][-1] == "-20.4"
    assert "no pre-training 60.4\xa0%</div>" in content


def test_reranked_recalls_and_the_matching_head_stand_below_retrieval(without_curves: Path) -> None:
    def scores(recall: float, accuracy: float) -> dict[str, object]:
        return {"txt_r1": 70.0, "reranked": {"txt_r1": recall}, "matching": {"accuracy": accuracy, "prior": 66.6}}

    intervals = {"matching": {"accuracy": [88.5, 91.5]}}
    part = scores(76.0, 90.0) | {"from_first_values": scores(54.0, 66.5), "intervals": intervals}
    (without_curves / "metrics.json").write_text(json.dumps({"retrieval": part}))
    found = [[cell.replace("\xa0", " ") for cell in row] for row in rows(build(without_curves))]
    labels, dash = [row[1] for row in found], "\N{EN DASH}"
    assert labels == ["Measure", "text R@1", "text R@1, re-ranked", "matching accuracy"]
    assert found[2][4:] == ["54.0 %", dash, dash, dash, "+22.0"]
    assert found[3][4:] == ["66.5 %", dash, "66.6 %", dash, "+23.4"] and "88.5" in found[3][2]


def test_words_join_as_they_were_written(content: str) -> None:
    text = Page(content).text
    assert "a red circle left of the a square" in text
    assert "Here 1 of 3 are correct." in text
    assert "[CLS]" not in text


def test_text_never_becomes_markup(content: str) -> None:
    assert "<script" not in content
    assert "<b>plain" not in content
    assert "<x>" not in content
    text = Page(content).text
    assert "<script>alert('x')</script> & \"quotes\"" in text
    assert "note: <b>plain</b>" in text
    assert "other <x>" in text


def test_the_same_folder_gives_the_same_page(run_folder: Path) -> None:
    assert build(run_folder / "vqa") == build(run_folder / "vqa")


def test_samples_under_their_former_key_are_shown(without_curves: Path) -> None:
    page, file = build(without_curves), without_curves / "pretrain/samples/samples.json"
    samples = json.loads(file.read_text())
    file.write_text(json.dumps({"pictures": samples.pop("images"), **samples}))
    assert build(without_curves) == page and "Reconstructed images" in page


def test_missing_parts_are_listed(run_folder: Path) -> None:
    expected = {
        "metrics.json": "Missing: scores of NLVR (metrics.json has none)",
        "commands.json": "Missing: commands.json",
        "pretrain/metrics.jsonl": "Missing: pretrain/metrics.jsonl",
        "pretrain/samples/samples.json": "Missing: expert load",
        "itr": "Missing: the folder itr/ of this stage",
        "vqa/samples": "Missing: vqa/samples/samples.json",
        "nlvr/samples/s0_0.png": "no image s0_0.png",
    }
    for name in expected:
        path = run_folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = Page(build(run_folder)).text
    for words in expected.values():
        assert words in text


def test_images_outside_the_run_and_damaged_ones_are_not_embedded(run_folder: Path, tmp_path: Path) -> None:
    samples = run_folder / "vqa" / "samples"
    shutil.copy(samples / "q0.png", tmp_path / "secret.png")
    (samples / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    names = ["../../../secret.png", str(tmp_path / "secret.png"), "damaged.png", None, ".", "\x00"]
    examples = [{"image": name, "question": "?", "predicted": "x", "answers": None, "score": None} for name in names]
    (samples / "samples.json").write_text(json.dumps({"examples": examples}))
    assert Page(build(run_folder / "vqa")).text.count("no image") == len(names)


def test_large_images_are_made_smaller(run_folder: Path) -> None:
    Image.effect_noise((1500, 900), 90).save(run_folder / "vqa" / "samples" / "q0.png")
    found = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', build(run_folder / "vqa"))
    assert len(found) == 1
    assert len(found[0]) < 100_000


@pytest.mark.parametrize(("stage", "titles"), [
    ("pretrain", ["scores", "training", "experts", "images", "words", "commands", "config"]),
    ("itr", ["scores", "training", "to-image", "to-text", "commands", "config"]),
    ("vqa", ["scores", "training", "vqa", "commands", "config"]),
    ("nlvr", ["scores", "training", "nlvr", "commands", "config"]),
])  # fmt: skip
def test_a_single_training_run_works_too(run_folder: Path, stage: str, titles: list[str]) -> None:
    content = build(run_folder / stage)
    assert re.findall(r'<section id="([a-z-]+)">', content) == titles
    assert "Missing: scores" in Page(content).text


def test_a_single_run_shows_its_own_scores(run_folder: Path) -> None:
    (run_folder / "nlvr" / "config.yaml").write_text("task: nlvr\n")
    (run_folder / "nlvr" / "scores_val.json").write_text(json.dumps({"accuracy": 0.5, "consistency": 0.1}))
    (run_folder / "nlvr" / "scores_test.json").write_text(json.dumps({"accuracy": 0.75, "consistency": 0.25}))
    text = Page(build(run_folder / "nlvr")).text
    assert "75.0\xa0%" in text
    assert "no baseline recorded" in text


def test_a_single_run_of_a_users_own_task(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_folder / "vqa"
    (folder / "scores_test.json").write_text(json.dumps({"color_accuracy": 81.25}))
    (folder / "config.yaml").write_text("task: docs.examples.my_task:SPEC\n")
    text = Page(build(folder)).text
    assert "Color" in text and "81.2\xa0%" in text
    (folder / "config.yaml").write_text("task: docs.examples.my_objective:SPEC\n")
    assert "Missing: scores" in Page(build(folder)).text and not caplog.records
    (folder / "config.yaml").write_text("task: gone.task:SPEC\n")
    assert "Missing: scores" in Page(build(folder)).text
    assert "its scores are not shown: task gone.task:SPEC: there is no module gone" in caplog.text


def test_a_single_run_without_its_config_shows_scores_of_a_built_in_task(run_folder: Path) -> None:
    folder = run_folder / "vqa"
    (folder / "config.yaml").unlink(missing_ok=True)
    (folder / "scores_test.json").write_text(json.dumps({"accuracy": 0.75, "consistency": 0.25}))
    assert "75.0\xa0%" in Page(build(folder)).text


def test_scores_older_than_the_newest_checkpoint_are_marked(run_folder: Path) -> None:
    forget_curves(run_folder, but="nlvr")
    model, checkpoints = run_folder / "nlvr" / "model", run_folder / "nlvr" / "checkpoints"
    model.mkdir()
    save_file({"weight": torch.zeros(1)}, model / "model.safetensors", metadata=metadata(4))
    words = "NLVR: scores, samples and the exported model are from step 4; the run has since continued to step 6"
    for step in (4, 6):
        assert words not in Page(build(run_folder)).text
        (checkpoints / f"step_{step:08d}").mkdir(parents=True)
        (checkpoints / f"step_{step:08d}" / "complete.json").write_text("{}")
    assert words in Page(build(run_folder)).text
    assert words.replace("NLVR", "Training") in Page(build(run_folder / "nlvr")).text


def test_a_score_has_its_interval_below_it(run_folder: Path) -> None:
    scores = {"accuracy": 0.75, "consistency": 0.25, "about": {"split": "test"}}
    (run_folder / "nlvr" / "scores_test.json").write_text(json.dumps(scores | {"intervals": {"accuracy": [0.7, 0.8]}}))
    table = rows(build(run_folder / "nlvr"))
    assert [row[2] for row in table[1:]] == ["75.0\xa0%70.0 to 80.0", "25.0\xa0%"]


def test_scores_of_incomplete_splits_are_marked(run_folder: Path) -> None:
    lack = {"statements": {"scored": 998, "of": 1000}, "dropped": {"image is missing": 1}}
    (run_folder / "nlvr" / "config.yaml").write_text("task: nlvr\n")
    (run_folder / "nlvr" / "scores_test.json").write_text(json.dumps({"accuracy": 0.75, "incomplete": lack}))
    text = Page(build(run_folder / "nlvr")).text
    assert "NLVR: scored on 998 of 1000 statements; dropped in the preparation: 1 image is missing." in text


def test_a_password_in_an_address_is_not_shown(run_folder: Path) -> None:
    (run_folder / "nlvr" / "config.yaml").write_text("data:\n  path: s3://me:sEcReT@bucket/data\n")
    page = build(run_folder / "nlvr")
    assert "s3://***@bucket/data" in page and "sEcReT" not in page


def test_a_running_job_and_values_that_are_not_finite(run_folder: Path) -> None:
    path = run_folder / "pretrain" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 401, "loss": null, "lr": NaN}\n{"step": 402, "lo')
    text = Page(build(run_folder / "pretrain")).text
    assert "1 line(s) of metrics.jsonl could not be read" in text
    assert "loss was not finite in 1 record(s)" in text


def test_held_out_losses_with_other_inputs_have_a_chart_and_its_legend(run_folder: Path) -> None:
    path = run_folder / "pretrain" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 400, "val/mlm_loss_shuffled": 2.5, "val/mlm_loss_no_image": 2.75}\n')
    content = build(run_folder / "pretrain")
    assert "Masked words: held-out loss, by image given" in Page(content).text
    figures = re.findall(r'style="background: var\(--c(\d)\)"></span>(true|shuffled 2.5|none 2.75)', content)
    # Not color 1, which the section's legend gives to training.
    assert figures == [("2", "true"), ("3", "shuffled 2.5"), ("4", "none 2.75")]


def test_recorded_versions_are_preferred(run_folder: Path) -> None:
    (run_folder / "vqa" / "versions.json").write_text(json.dumps({"torch": "9.9.9+<cpu>"}))
    text = Page(build(run_folder / "vqa")).text
    assert "9.9.9+<cpu>" in text
    assert "Versions recorded by the run" in text


def test_versions_of_the_newest_start_are_shown(run_folder: Path) -> None:
    forget_curves(run_folder, but="vqa")
    assert "The run recorded none; these are the versions on the machine" in Page(build(run_folder)).text
    (run_folder / "vqa" / "provenance").mkdir()
    for number, version in ((9, "0.0.9"), (10, "0.0.10<cpu>")):
        record = {"versions": {"torch": version}, "step": number}
        (run_folder / "vqa" / "provenance" / f"start_{number}.json").write_text(json.dumps(record))
    for folder in (run_folder / "vqa", run_folder):
        text = Page(build(folder)).text
        assert "0.0.10<cpu>" in text and "0.0.9" not in text and "Versions recorded by the run" in text
    (run_folder / "vqa" / "provenance" / "start_11.json").write_text(json.dumps({"versions": ["torch"]}))
    assert read_run(run_folder / "vqa").versions is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, None, "--run {run}: no such folder"),
        ("x.txt", "", "--run {run}: holds no run"),
        ("metrics.json", '{"vqa": }', "{run}/metrics.json: invalid JSON at line 1 column 9"),
        ("metrics.json", "[]", "{run}/metrics.json: must hold a JSON object"),
        ("commands.json", '[{"title": "x"}]', "{run}/commands.json: entry 0 must be an object with a text 'command'"),
        ("vqa/samples/samples.json", "{", "{run}/vqa/samples/samples.json: invalid JSON at line 1 column 2"),
    ],
)
def test_bad_folders_exit_with_2_and_one_line(tmp_path: Path, capsys, name, content, words: str) -> None:
    folder = tmp_path / "run"
    if name:
        (folder / name).parent.mkdir(parents=True)
        if name not in ("x.txt", "metrics.json"):
            (folder / "metrics.json").write_text("{}")
            (folder / "pretrain").mkdir()
        (folder / name).write_text(content)
    assert run(main, ["--run", str(folder), "--out", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert words.format(run=folder) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_odd_values_are_left_out_and_the_others_shown(run_folder: Path) -> None:
    """Numbers beyond all floats, a layer whose counts are none, a line nested a hundred thousand deep."""
    metrics = json.loads((run_folder / "metrics.json").read_text())
    metrics["vqa"]["overall"] = 10**400
    (run_folder / "metrics.json").write_text(json.dumps(metrics))
    samples = run_folder / "pretrain/samples/samples.json"
    tree = json.loads(samples.read_text())
    layers = tree["expert_load"]["layers"]
    layers[1]["counts"] = [[[1], 2], [3, None]]
    samples.write_text(json.dumps(tree))
    with open(run_folder / "vqa/metrics.jsonl", "a") as file:
        file.write(f'{{"step": {10**400}}}\n{"[" * 100_000}\n{{"step": 61, "loss": {10**400}, "samples": 5856}}\n')
    commands = [{"title": "a", "command": "b", "seconds": 1e999}, {"title": "c", "command": "d", "seconds": 65}]
    (run_folder / "commands.json").write_text(json.dumps(commands))
    content = build(run_folder)
    page = Page(content)
    assert re.findall(r'<th rowspan="2">(\d)</th>', content) == [str(layers[0]["layer"])]
    assert "accuracy" in page.text and "74.2\xa0%" in page.text and "78.3\xa0%" not in page.text
    assert "2 line(s) of vqa/metrics.jsonl could not be read." in page.text
    assert "2 commands, 1 min 05 s in total" in page.text and "at the same time" not in page.text
    commands[1]["beside"] = True
    (run_folder / "commands.json").write_text(json.dumps(commands))
    assert "2 commands, 1 min 05 s in total. Some ran at the same time." in Page(build(run_folder)).text
