"""Fuzz targets of training: shards and manifests, recipes, DeepSpeed files, checkpoints, tokenizers, models."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import sentencepiece
import torch
import yaml
from deepspeed.checkpoint import constants
from deepspeed.utils.tensor_fragment import fragment_address

from eve_ds.callbacks.metrics import lines_until
from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.config_sections import EngineConfig, OptimizerConfig
from eve_ds.data.batch_reader import BatchReader
from eve_ds.data.sampler import MicroBatchIndices
from eve_ds.data.samples import CaptionSamples, Samples
from eve_ds.data.shards import RowError, Split
from eve_ds.data.sources import open_split
from eve_ds.data.transforms import build_transform
from eve_ds.engine.checkpoint_record import COMPLETE, Manifest, Topology, file_names, hash_files
from eve_ds.engine.deepspeed_config import load_deepspeed_config
from eve_ds.engine.identity import Identity
from eve_ds.engine.run_folder import claim
from eve_ds.engine.verification import verify_now
from eve_ds.engine.whole_weights import consolidated_state
from eve_ds.errors import exit_code
from eve_ds.tasks import load_task_model
from eve_ds.tasks.nlvr import NlvrSamples
from eve_ds.tasks.vqa import VqaSamples, read_answer_list
from eve_ds.weights.load import load_weights
from eve_ds.weights.model_folder import HASHES
from preprocessing.errors import UserError
from preprocessing.shards.schema import MANIFEST
from preprocessing.text.tokenizer import Tokenizer
from tests.support.foreign_shards import vilt_coco, vilt_nlvr, vilt_vqa
from tests.support.fuzz.mutate import damaged_bytes
from tests.support.fuzz.runner import Target, Wrong
from tests.support.fuzz.seeds import dumped, lines, tree_of
from tests.support.model_folder import write_model_folder
from tests.support.shards import make_caption_set, make_nlvr_set, make_vqa_set, tiny_tokenizer
from tests.support.tiny_tasks import tiny_task

TRANSFORM = build_transform(16, train=False)
ROOT = Path(__file__).resolve().parents[3]
ASSETS = ROOT / "tests/assets"


def _built(make: Callable[[Path], Any]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        return tree_of(Path(scratch))


def _command(read: Callable[[Path], None]) -> Callable[[Path], int]:
    """As an entry point would run it."""
    return lambda folder: exit_code(lambda: read(folder))


# ---------------------------------------------------------------------------------------------------------- shards


def _samples(split: Split, root: Path, tokenizer: Tokenizer) -> Samples:
    if split.kind == "vqa":
        return VqaSamples(split, tokenizer, TRANSFORM, 16, answer_list=read_answer_list(root))
    return {"caption": CaptionSamples, "nlvr": NlvrSamples}[split.kind](split, tokenizer, TRANSFORM, 16)


def _read_all(split: Split, root: Path, tokenizer: Tokenizer) -> list[str]:
    """Read every sample as a loader does; returns what it reads as texts."""
    samples = _samples(split, root, tokenizer)
    indices = MicroBatchIndices(np.arange(len(samples)), np.zeros(len(samples), dtype=np.int64), None, len(samples))
    batch = BatchReader(samples, 1, replace=True)[0, indices]
    if batch.failure is not None:
        raise UserError(batch.failure)
    found = []
    for index in range(len(samples)):
        try:
            images = [hashlib.sha256(samples.image_bytes(index, n)).hexdigest() for n in range(len(samples.images))]
            found.append(f"{samples.text(index)} {images}")
        except RowError as error:
            found.append(str(error))
    return found


def shards() -> list[Target]:
    """A split that is verified; damaged shards whose hash is right; damaged manifests; ViLT's files without one."""
    tokenizer = tiny_tokenizer()
    found = []
    for make in (make_caption_set, make_vqa_set, make_nlvr_set):
        files = _built(lambda root, make=make: make(root, 5, shard_rows=3))  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch), 5, shard_rows=3)
            sound = _read_all(open_split(Path(scratch), "train"), Path(scratch), tokenizer)

        def verified(folder: Path, sound: list[str] = sound) -> None:
            split = open_split(folder, "train")
            verify_now(split.hashed_shards)
            if _read_all(split, folder, tokenizer) != sound:
                raise Wrong("the hashes are right, and other samples were read")

        def read(folder: Path) -> None:
            split = open_split(folder, "train")
            texts = _read_all(split, folder, tokenizer)
            said = json.loads((folder / "train" / MANIFEST).read_bytes())["samples"]
            if len(texts) != said:
                raise Wrong(f"{len(texts)} samples of {said}")

        kind = make.__name__[5:-4]
        arrow = [name for name in files if name.endswith(".arrow")]
        found += [
            Target(f"verified-{kind}", files, arrow, _command(verified)),
            Target(f"rehashed-{kind}", files, arrow, _command(read), damage=_damaged_arrow, mend=_rehash),
            Target(f"manifest-{kind}", files, [name for name in files if name.endswith(".json")], _command(read)),
        ]
    for make_foreign in (vilt_coco, vilt_vqa, vilt_nlvr):
        files = _built(make_foreign)
        files = {name: content for name, content in files.items() if "train" in name or "val" in name}
        victims = [name for name in files if name.endswith("_train.arrow")]

        def foreign(folder: Path) -> None:
            split = open_split(folder, "train")
            _read_all(split, folder, tokenizer)

        found.append(Target(make_foreign.__name__, files, victims, _command(foreign), damage=_damaged_arrow))
    return found


def _damaged_arrow(name: str, data: bytes, rng: Any) -> bytes:
    """Half of the time near the end, where the index is, or near the start, where the columns are described."""
    edge = min(len(data), 2048)
    choice = rng.randrange(4)
    if choice == 0:
        return data[:-edge] + damaged_bytes(data[-edge:], rng)
    if choice == 1:
        return damaged_bytes(data[:edge], rng) + data[edge:]
    return damaged_bytes(data, rng)


def _rehash(folder: Path) -> None:
    """Write the sizes and hashes of the shards as they are into the manifest."""
    path = folder / "train" / MANIFEST
    manifest = json.loads(path.read_bytes())
    for shard in manifest["shards"]:
        content = (folder / "train" / shard["file"]).read_bytes()
        shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_bytes(dumped(manifest))


# ------------------------------------------------------------------------------------------------ recipes, DeepSpeed


def settings() -> list[Target]:
    """Recipes, a run's stored config, DeepSpeed's JSON, and metrics.jsonl as a resumed run reads it."""
    recipe = (ROOT / "eve_ds/configs/tiny_shapes.yaml").read_bytes()

    def parsed(folder: Path) -> None:
        config = parse(PretrainConfig, ["--config", f"{folder}/r.yaml"], "fuzz")
        stored = yaml.safe_load(yaml.safe_dump(yaml.safe_load((folder / "r.yaml").read_text())))
        if stored and stored.get("optimizer", {}).get("lr") not in (None, config.optimizer.lr):
            raise Wrong(f"lr {config.optimizer.lr}, the recipe has {stored['optimizer']['lr']!r}")

    def tuned(folder: Path) -> None:
        parse(FinetuneConfig, ["--config", f"{folder}/r.yaml"], "fuzz")

    def deepspeed_file(folder: Path) -> None:
        engine = EngineConfig(global_batch_size=32, precision="bf16")
        load_deepspeed_config(f"{folder}/z.json", engine, OptimizerConfig(), 2)

    def resumed(folder: Path) -> None:
        kept = lines_until(folder / "m.jsonl", 3)
        if not all(0 < float(json.loads(line)["step"]) <= 3 for line in kept):
            raise Wrong("a record of a later step is kept")

    records = lines(json.dumps({"step": n, "loss": 1.5, "lr": 0.1}) for n in range(1, 6))
    config = PretrainConfig(output_dir="run")
    identity = Identity.from_config(dataclasses.asdict(config))
    begun = {"run/identity.json": dumped(identity.tree()), "run/metrics.jsonl": records}
    begun["run/config.yaml"] = yaml.safe_dump(dataclasses.asdict(config)).encode()

    def claimed(folder: Path) -> None:
        """What is taken for the same run must be."""
        claim(dataclasses.replace(config, output_dir=f"{folder}/run"), identity)
        if json.loads((folder / "run/identity.json").read_bytes()) != identity.tree():
            raise Wrong("the run has another identity now")

    finetune = b"task: vqa\n" + b"\n".join(
        line for line in recipe.split(b"\n") if not line.startswith((b"objective", b"  decoder", b"  mode"))
    )
    zero = dumped({
        "zero_optimization": {"stage": 2, "contiguous_gradients": True, "reduce_bucket_size": 1000,
                              "offload_optimizer": {"device": "cpu"}},
        "train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": False,
    })  # fmt: skip
    return [
        Target("recipe", {"r.yaml": recipe}, ["r.yaml"], _command(parsed)),
        Target("recipe-finetune", {"r.yaml": finetune}, ["r.yaml"], _command(tuned)),
        Target("run-folder", begun, ["run/identity.json", "run/config.yaml"], _command(claimed)),
        Target("metrics-resume", {"m.jsonl": records}, ["m.jsonl"], _command(resumed)),
        Target("deepspeed", {"z.json": zero}, ["z.json"], _command(deepspeed_file)),
    ]


# -------------------------------------------------------------------------------------------------------- checkpoints

STEP = "run/checkpoints/step_00000003"


def _checkpoint() -> dict[str, bytes]:
    """What DeepSpeed leaves at ZeRO 2 with one rank, of a model of two tensors."""
    names = {"backbone.a": torch.Size([3, 2]), "backbone.b": torch.Size([4])}
    flat = torch.arange(10, dtype=torch.float32)
    places = {"backbone.a": fragment_address(numel=6, start=0), "backbone.b": fragment_address(numel=4, start=6)}
    state = {
        "dp_world_size": 1, "ds_config": {"zero_optimization": {"stage": 2}}, "ds_version": deepspeed.__version__,
        constants.PARAM_SHAPES: [names], "module": {name: torch.zeros(shape) for name, shape in names.items()},
    }  # fmt: skip
    adam = {"state": {0: {"step": 3, "exp_avg": flat.clone(), "exp_avg_sq": flat.clone()}}}
    optimizer = {
        "param_slice_mappings": [places], "single_partition_of_fp32_groups": [flat],
        constants.BASE_OPTIMIZER_STATE: adam,
    }  # fmt: skip

    def make(root: Path) -> None:
        folder = root / STEP
        folder.mkdir(parents=True)
        torch.save(state, folder / "mp_rank_00_model_states.pt")
        torch.save({constants.OPTIMIZER_STATE_DICT: optimizer}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        hashes = hash_files(folder, file_names(folder))
        Manifest(3, Topology(1, 1, 2), {}, deepspeed.__version__, {"step": 3}, hashes).write(folder)

    return _built(make)


def _rehash_checkpoint(folder: Path) -> None:
    path = folder / STEP / COMPLETE
    record = json.loads(path.read_bytes())
    record["files"] = hash_files(path.parent, file_names(path.parent))
    path.write_bytes(dumped(record))


def checkpoints() -> list[Target]:
    """complete.json and the .pt files, their hashes wrong or right."""
    files = _checkpoint()
    sound = {"backbone.a": torch.arange(6.0).view(3, 2), "backbone.b": torch.arange(6.0, 10.0)}

    def read(folder: Path) -> None:
        state = consolidated_state(folder / STEP)
        if state.keys() != sound.keys() or not all(torch.equal(state[name], sound[name]) for name in sound):
            raise Wrong("the hashes are right, and other weights were read")

    def rehashed(folder: Path) -> None:
        for name, tensor in consolidated_state(folder / STEP).items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise Wrong(f"{name!r} is {type(tensor)}")

    pickles = [name for name in files if name.endswith(".pt")]
    return [
        Target("checkpoint", files, list(files), _command(read)),
        Target("checkpoint-rehashed", files, pickles, _command(rehashed), mend=_rehash_checkpoint),
    ]


# --------------------------------------------------------------------------------------------------- tokenizers, models


def tokenizers() -> list[Target]:
    """tokenizer.json, WordPiece, byte-level BPE and SentencePiece, loaded and used."""
    tokenizer = tiny_tokenizer()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square", "##s"]
    letters = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "r": 6, "e": 7, "re": 8}

    def used(folder: Path) -> None:
        found = Tokenizer.load(folder)
        ids = found.encode("a red square", 16)
        if not 2 <= len(ids) <= 16 or min(ids) < 0 or max(ids) >= found.vocab_size:
            raise Wrong(f"ids {ids} of {found.vocab_size}")
        found.decode(ids)
        found.fingerprint  # noqa: B018

    own = _built(tokenizer.save)
    piece = {"vocab.txt": "\n".join(words).encode(), "tokenizer_config.json": b'{"do_lower_case": true}'}
    pairs = {"vocab.json": dumped(letters), "merges.txt": b"#version: 0.2\nr e\n"}
    model = _sentencepiece()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    pieces = {"spiece.model": model, "added_tokens.json": dumped({"[EXTRA]": size})}
    named = {"tokenizer-json": own, "vocab-txt": piece, "vocab-json": pairs, "sentencepiece": pieces}
    return [Target(name, files, list(files), _command(used)) for name, files in named.items()]


def _sentencepiece() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"an image of {n} red squares and a blue circle" for n in range(40)]),
        model_writer=model, vocab_size=60, hard_vocab_limit=False, model_type="unigram", minloglevel=2,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece="<pad>", bos_piece="[CLS]", eos_piece="[SEP]",
        control_symbols=["[MASK]"],
    )  # fmt: skip
    return model.getvalue()


def models() -> list[Target]:
    """A model folder with its hashes, one without, a bare .pt file, and a model in the published naming."""
    task = tiny_task("retrieval")
    state = {name: value.detach() for name, value in task.state_dict().items()}
    files = _built(lambda root: write_model_folder(root, task))
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.ones(3), "b": torch.zeros(2, 2)}}, buffer)

    def loaded(folder: Path) -> None:
        model = load_task_model("retrieval", folder)
        found = model.state_dict()
        if not all(torch.equal(found[name], state[name]) for name in state):
            raise Wrong("other weights were loaded")

    def rehashed(folder: Path) -> None:
        load_task_model("retrieval", folder)

    def bare(folder: Path) -> None:
        load_weights(folder / "w.pt")

    def published(folder: Path) -> None:
        load_task_model("vqa", folder / "vqa.safetensors", vlmo_config=folder / "vlmo.json")

    theirs = {"vqa.safetensors": (ASSETS / "vqa.safetensors").read_bytes()}
    theirs["vlmo.json"] = (ASSETS / "vlmo_config.json").read_bytes()
    without = {name: content for name, content in files.items() if name != HASHES}
    return [
        Target("model-folder", files, list(files), _command(loaded)),
        Target("model-unhashed", without, list(without), _command(rehashed)),
        Target("published", theirs, list(theirs), _command(published)),
        Target("weights-pt", {"w.pt": buffer.getvalue()}, ["w.pt"], _command(bare)),
    ]
