"""Which source and which transform a configuration means, for every kind of data (spec §15)."""

import io
import json
import re
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from common.errors import UserError
from models import UniversalPrompting
from models.clip_encoder import image_processor_class
from models.images import preprocess
from tests.tiny_llms import qwen_like
from tests.training.tiny import (
    CAPTIONS,
    build_flows,
    check_data,
    config_of,
    image_bytes,
    picture,
    sample,
    write_shard,
    write_texts,
    write_world,
)
from training.data.flows import end_together
from training.data.image_text import CAPTION_INSTRUCTIONS
from training.data.sources import Resampled
from training.data.streams import Flow, stack

FLOWS = ("t2i", "lm", "mmu")
PARAMS, PREPROCESSING = "dataset.params", "dataset.preprocessing"


def path_of(flow: str, split: str = "train") -> str:
    return f"{PARAMS}.{split}_{flow}_shards_path_or_url"


def only(flow: str) -> dict:
    return {f"training.batch_size_{other}": 0 for other in FLOWS if other != flow}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "llm")


@pytest.fixture
def processor():
    return image_processor_class()(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


def flows_of(world, overrides: dict, **settings) -> dict[str, Flow]:
    return build_flows(config_of(world, overrides=overrides), **settings)


def flow_of(world, flow: str, overrides: dict, **settings) -> Flow:
    return flows_of(world, only(flow) | overrides, **settings)[flow]


def take(flow: Flow, batches: int) -> list:
    return [item for _ in range(batches) for item in next(flow)]


# ---- paths ----


def test_all_missing_sources_are_listed_at_once(world):
    paths = dict(zip(map(path_of, FLOWS), ("/nowhere/a-{000..003}.tar", None, "/nowhere/c.tar"), strict=True))
    others = {"external_caption_path": "/nowhere/captions", "external_cc12m_caption_path": "/nowhere/cc12m"}
    config = config_of(world, overrides=paths | {f"{PARAMS}.{key}": value for key, value in others.items()})
    with pytest.raises(UserError) as error:
        check_data(config)
    message = str(error.value)
    assert all(key in message for key in (*paths, *others))
    assert all(f"/nowhere/{name}" in message for name in ("a-000.tar", "a-003.tar", "c.tar", "captions", "cc12m"))
    assert "4 of 4" in message and "\n" not in message


def test_an_unset_environment_variable_hides_nothing_else_that_is_missing(world):
    root = "${oc.env:SHOWO_UNSET_A}/${oc.env:SHOWO_UNSET_B}"
    unset = {path_of("lm"): "${oc.env:SHOWO_UNSET}/x.parquet", f"{PARAMS}.train_mmu_image_root": root}
    others = {"dataset.und_type": "llava_tuning", path_of("mmu"): "/nowhere/a.json", path_of("t2i"): "/nowhere/b.tar"}
    with pytest.raises(UserError) as error:
        check_data(config_of(world, overrides=unset | others))
    message = str(error.value)
    assert f"{path_of('lm')} needs environment variables that are not set: SHOWO_UNSET; set them or give" in message
    assert "SHOWO_UNSET_A, SHOWO_UNSET_B;" in message
    assert "/nowhere/a.json" in message and "/nowhere/b.tar" in message


def test_held_out_paths_are_checked_too_and_addresses_are_not(world):
    config = config_of(world, overrides={path_of("mmu", "eval"): "/nowhere/b.tar"})
    with pytest.raises(UserError, match=r"eval_mmu_shards_path_or_url: 1 of 1 files do not exist: /nowhere/b\.tar"):
        check_data(config)
    check_data(config_of(world, overrides={path_of("t2i"): "https://host/a.tar", path_of("mmu"): "pipe:aws cp s3://a"}))


def test_a_flow_of_batch_size_0_needs_no_data(world):
    assert list(flows_of(world, {"training.batch_size_mmu": 0, path_of("mmu"): "/nowhere.tar"})) == ["t2i", "lm"]
    with pytest.raises(UserError, match="all 0"):
        flows_of(world, {f"training.batch_size_{flow}": 0 for flow in FLOWS})


@pytest.mark.parametrize(
    ("flow", "kind", "files", "message"),
    [
        ("t2i", "t2i", "{0}/texts.parquet", r"'t2i' reads files of one sort of .*; got .*texts\.parquet"),
        ("t2i", "t2i_parquet", "{0}/train-000000.tar", r"'t2i_parquet' reads .*; got .*train-000000\.tar"),
        ("t2i", "imagenet1k", "{0}/texts.parquet", r"'imagenet1k' reads .*; got .*texts\.parquet"),
        ("mmu", "llava_tuning", "{0}/texts.parquet", r"'llava_tuning' reads .*; got .*texts\.parquet"),
        ("lm", "", "{0}/train-000000.tar", r"the lm flow reads .*; got .*train-000000\.tar"),
        ("lm", "", "[{0}/texts.parquet,{0}/corpus.txt]", r"\.parquet, \.jsonl, \.txt; got .*parquet and .*corpus\.txt"),
        ("lm", "", "https://host/a.jsonl", "got https://host/a.jsonl; only shards can be read from an address: fetch"),
        ("lm", "", "pipe:cat a.parquet", "got pipe:cat a.parquet; only shards"),
        ("lm", "", "pipe:cat a", "got pipe:cat a; only shards"),
        ("t2i", "t2i", "https://h/a.parquet", "got https://h/a.parquet; only shards"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(world, flow, kind, files, message):
    key = {"t2i": "dataset.gen_type", "mmu": "dataset.und_type"}.get(flow)
    config = config_of(world, overrides={path_of(flow): files.format(world)} | ({key: kind} if key else {}))
    with pytest.raises(UserError, match=f"{path_of(flow)}: .*{message}"):
        check_data(config)


# ---- every kind ----


def test_shards(world):
    flows = flows_of(world, {f"{PREPROCESSING}.resolution": 16})
    assert list(flows) == list(FLOWS)
    batch = next(flows["t2i"])
    pixels = stack(batch, "image")
    assert pixels.shape == (4, 3, 16, 16) and -1 <= pixels.min() < pixels.max() <= 1
    assert {item["text"] for item in batch} <= set(CAPTIONS)
    (text,), answers = next(flows["lm"]), [item["text"] for item in next(flows["mmu"])]
    assert "\n" not in text
    assert len(answers) == 2 and all(text.startswith("USER: \n") for text in answers)


@pytest.mark.parametrize("flow", ["t2i", "mmu"])
@pytest.mark.parametrize("form", ["bytes", "path"])
def test_parquet_with_images(world, tmp_path, flow, form):
    """Bytes in columns that are found, and paths below a folder in columns that are named."""
    (tmp_path / "images").mkdir()
    for number, text in enumerate(CAPTIONS):
        picture(text).save(tmp_path / "images" / f"{number}.png")
    columns = {
        "bytes": {"image": [image_bytes(picture(text)) for text in CAPTIONS], "caption": CAPTIONS},
        "path": {"photo": [f"{number}.png" for number in range(len(CAPTIONS))], "words": CAPTIONS},
    }[form]
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=5)
    settings = {path_of(flow): tmp_path / "a.parquet", f"{PARAMS}.add_caption_prompt": False}
    settings |= {"dataset.gen_type": "t2i_parquet", "dataset.und_type": "captioning_parquet"}
    if form == "path":
        with pytest.raises(UserError, match="its columns are photo, words; name one by dataset.*image_col"):
            flow_of(world, flow, settings)
        settings |= {f"{PARAMS}.image_column": "photo", f"{PARAMS}.text_column": "words"}
        settings |= {f"{PARAMS}.train_{flow}_image_root": tmp_path / "images"}
    items = take(flow_of(world, flow, settings), 3 if flow == "t2i" else 6)
    assert sorted(item["text"] for item in items) == sorted(CAPTIONS), "one epoch"
    for item in items:
        assert torch.equal(item["image"], preprocess(picture(item["text"]), 32))


def test_imagenet(world, tmp_path):
    for number, text in enumerate(CAPTIONS[:2] * 4):
        folder = tmp_path / "train" / f"n0000000{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(text).save(folder / f"{number}.JPEG", quality=100)
    (tmp_path / "names.txt").write_text(f"n00000000 {CAPTIONS[0]}\nn00000001 {CAPTIONS[1]}")
    settings = {"dataset.gen_type": "imagenet1k", path_of("t2i"): tmp_path}
    named = settings | {f"{PARAMS}.class_names_path": tmp_path / "names.txt"}
    items = take(flow_of(world, "t2i", named), 2)
    assert sorted(item["text"] for item in items) == sorted(CAPTIONS[:2] * 4)
    for item in items:
        assert (item["image"] - preprocess(picture(item["text"]), 32)).abs().mean() < 0.1
    assert next(flow_of(world, "t2i", settings))[0]["text"].startswith("n0000000"), "without their names"
    with pytest.raises(UserError, match="class_names_path: 1 of 1 files do not exist"):
        flow_of(world, "t2i", settings | {f"{PARAMS}.class_names_path": "/nowhere.txt"})
    shards = flow_of(world, "t2i", settings | {path_of("t2i"): world / "train-000000.tar"})
    assert {item["text"] for item in take(shards, 2)} <= set(CAPTIONS)


def llava(tmp_path, **overrides) -> dict:
    """The settings of six records with images, and one without."""
    records = []
    for number, text in enumerate(CAPTIONS[:6]):
        picture(text).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (tmp_path / "llava.json").write_text(json.dumps([*records, {"id": "no image", "conversations": turns}]))
    settings = {path_of("mmu"): tmp_path / "llava.json", f"{PARAMS}.train_mmu_image_root": tmp_path}
    return settings | {"dataset.und_type": "llava_tuning", f"{PREPROCESSING}.max_seq_length": 40} | overrides


@pytest.mark.parametrize("kind", ["llava_pretrain", "llava_tuning"])
@pytest.mark.parametrize("clip", [False, True])
def test_llava(world, tmp_path, tokenizer, processor, kind, clip):
    settings = llava(tmp_path, **{"dataset.und_type": kind})
    flow = flow_of(world, "mmu", settings, tokenizer=tokenizer, image_processor=processor if clip else None)
    items, image = take(flow, 3), "pixel_values" if clip else "image"
    texts = {tokenizer.decode(item["input_ids"]).removesuffix(tokenizer.eos_token) for item in items}
    form = "{}\n" if clip and kind == "llava_pretrain" else "USER:What?ASSISTANT:{}"
    assert {text.replace(" ", "") for text in texts} == {form.format(t.replace(" ", "")) for t in CAPTIONS[:6]}
    for item in items:
        assert item.keys() == {image, "input_ids", "labels", "key"}
        assert item["labels"].shape == item["input_ids"].shape and (item["labels"] != -100).any()
    assert stack(next(flow), image).shape == ((2, 3, 24, 24) if clip else (2, 3, 32, 32))


def test_llava_as_a_chat(world, tmp_path, tokenizer):
    settings = llava(tmp_path, conversation="chat", **{f"{PREPROCESSING}.max_seq_length": 80})
    chat = UniversalPrompting(qwen_like()).tokenizer
    (item, _) = next(flow_of(world, "mmu", settings, tokenizer=chat))
    assert "<|im_start|>user\nWhat?<|im_end|>\n" in chat.decode(item["input_ids"])
    assert chat.decode(item["labels"][item["labels"] != -100]).endswith("<|im_end|>")
    with pytest.raises(UserError, match="conversation=chat: the tokenizer has no chat template"):
        flow_of(world, "mmu", settings, tokenizer=tokenizer)


def test_llava_from_shards(world, tmp_path, tokenizer):
    settings = llava(tmp_path)
    record = json.dumps(json.loads((tmp_path / "llava.json").read_text())[0]).encode()
    shard = write_shard(tmp_path / "a.tar", [sample(text) | {"json": record} for text in CAPTIONS])
    (item, _) = next(flow_of(world, "mmu", settings | {path_of("mmu"): shard}, tokenizer=tokenizer))
    assert item["image"].shape == (3, 32, 32) and "input_ids" in item


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_language(world, tmp_path, form):
    texts, path = [f"document {i}\nof two lines" for i in range(6)], tmp_path / f"a.{form}"
    if form == "parquet":
        write_texts(path, texts, column="body", row_group_size=4)
    else:
        path.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    with pytest.raises(UserError, match="has no column 'content'; its columns are body; .*dataset.params.lm_column"):
        flow_of(world, "lm", {path_of("lm"): path})
    items = take(flow_of(world, "lm", {path_of("lm"): tmp_path, f"{PARAMS}.lm_column": "body"}), 6)
    assert sorted(items) == [text.replace("\n", "") for text in texts]


# ---- codes ----


def code_shard(folder, **manifest) -> dict:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(16, dtype=np.uint16))
    samples = [{"codes.npy": buffer.getvalue(), "txt": text.encode()} for text in CAPTIONS]
    shard = write_shard(folder / "codes-000000.tar", samples)
    sizes = {"resolution": 32, "num_vq_tokens": 16, "codebook_size": 64, "tokenizer": "tiny"} | manifest
    (folder / "codes-manifest.json").write_text(json.dumps({"shards": [], "samples": len(samples)} | sizes))
    return {path_of("t2i"): shard, path_of("mmu"): shard}


def test_shards_of_codes_serve_in_place_of_pixels(world, tmp_path, processor):
    for name, flow in flows_of(world, code_shard(tmp_path)).items():
        if name != "lm":
            batch = next(flow)
            assert stack(batch, "codes").tolist() == [list(range(16))] * len(batch)
            assert all(item.keys() == {"codes", "text", "key"} for item in batch)
    with pytest.raises(UserError, match="the CLIP-ViT branch sees pixels"):
        flow_of(world, "mmu", code_shard(tmp_path), image_processor=processor)
    assert next(flow_of(world, "t2i", code_shard(tmp_path), image_processor=processor))[0]["codes"].shape == (16,)


def test_a_manifest_for_another_resolution_is_a_clear_mistake(world, tmp_path):
    message = "codes-manifest.json: these codes were made for resolution 64, here 32; num_vq"
    with pytest.raises(UserError, match=message):
        flows_of(world, code_shard(tmp_path, resolution=64, num_vq_tokens=64))


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("setting", [{"random_flip": True}, {"und_random_flip": True}, {"und_jitter": 0.1}])
def test_codes_cannot_be_mirrored_or_moved(world, tmp_path, setting, with_manifest):
    settings = code_shard(tmp_path) | {f"{PREPROCESSING}.{key}": value for key, value in setting.items()}
    if not with_manifest:
        (tmp_path / "codes-manifest.json").unlink()
    with pytest.raises(UserError, match="codes cannot be mirrored or moved; turn .*random_flip.* off"):
        next(flow_of(world, "mmu", settings))


# ---- texts and augmentation ----


def test_the_instruction_can_be_left_out_and_t2i_never_has_it(world):
    flows = flows_of(world, {f"{PARAMS}.add_caption_prompt": False})
    assert {item["text"] for name in ("t2i", "mmu") for item in next(flows[name])} <= set(CAPTIONS)


def test_captions_from_elsewhere_reach_both_flows_if_their_key_is_set(world, tmp_path):
    caption = "The image features a thing. More of it."
    (tmp_path / "a-000.txt").write_text(caption)
    (tmp_path / "SA1B").mkdir()
    shard = write_shard(tmp_path / "SA1B" / "a.tar", [sample(CAPTIONS[0])])
    with tarfile.open(tmp_path / "b.tar", "w") as archive, tarfile.open(shard) as other:
        for member in other:
            content = other.extractfile(member)
            member.name = f"SA1B/{member.name}"
            archive.addfile(member, content)
    settings = {path_of(name): tmp_path / "b.tar" for name in ("t2i", "mmu")}
    flows = flows_of(world, settings | {f"{PARAMS}.external_caption_path": tmp_path})
    assert {item["text"] for item in take(flows["t2i"], 12)} == {"a thing", "a thing. More of it."}
    for item in take(flows["mmu"], 3):
        instruction, text = re.fullmatch(r"USER: \n(.+) ASSISTANT: (.+)", item["text"]).groups()
        assert instruction in CAPTION_INSTRUCTIONS and text == caption
    with pytest.raises(UserError, match="external_laion12m_caption_path has no effect without .*external_caption_path"):
        flows_of(world, {f"{PARAMS}.external_laion12m_caption_path": world})
    assert flows_of(world, {f"{PARAMS}.external_laion12m_caption_path": ""}), "as the published files leave it"


def test_augmentation_of_the_mmu_flow_leaves_t2i_images_alone(world):
    plain = {preprocess(picture(text), 32).numpy().tobytes() for text in CAPTIONS}
    flows = flows_of(world, {f"{PREPROCESSING}.und_jitter": 0.2})
    t2i, mmu = ([item["image"].numpy().tobytes() for item in take(flows[name], 3)] for name in ("t2i", "mmu"))
    assert set(t2i) <= plain and not set(mmu) & plain


# ---- shares and epochs ----


def test_processes_and_flows_have_data_of_their_own(world):
    def captions(process, name, seed=10086):
        flow = flows_of(world, {"training.seed": seed}, process=process, num_processes=2)[name]
        return [item["text"][-24:] for item in take(flow, 5)]

    assert captions(0, "t2i") == captions(0, "t2i")
    assert captions(0, "t2i") not in (captions(1, "t2i"), captions(0, "t2i", seed=1))
    assert captions(0, "t2i")[:10] != captions(0, "mmu")


def test_published_limits_make_epochs(world):
    limits = {"experiment.max_train_examples_t2i": 100, "experiment.max_train_examples_mmu": 20}
    for mode, samples, batches in (
        ({}, {"t2i": 100, "lm": 12, "mmu": 20}, [13, 6, 5]),
        ({"dataset.combined_loader_mode": "min_size"}, {"t2i": 40, "lm": 10, "mmu": 20}, [5, 5, 5]),  # end together
    ):
        flows = flows_of(world, limits | mode, num_processes=2)
        assert {name: flow.source.samples for name, flow in flows.items()} == samples
        assert [flow.batches_per_epoch for flow in flows.values()] == batches


def test_flows_without_an_end_follow_the_others():
    t2i, mmu = Resampled(iter), Resampled(iter)
    end_together({t2i: 4, mmu: 2})
    assert t2i.samples is mmu.samples is None
    mmu.samples = 30
    end_together({t2i: 4, mmu: 2})
    assert t2i.samples == 60


# ---- held-out data ----


def test_held_out_flows_are_the_same_in_every_run_and_plain(world, tmp_path):
    shard = write_shard(tmp_path / "heldout.tar", [sample(text) for text in CAPTIONS[:5]])
    settings = {path_of("t2i", "eval"): shard, path_of("mmu", "eval"): shard, f"{PARAMS}.num_workers": 2}
    settings |= {f"{PREPROCESSING}.random_flip": True, f"{PREPROCESSING}.und_jitter": 0.2}

    def texts(seed) -> dict[str, list[str]]:
        flows = flows_of(world, settings | {"training.seed": seed}, split="eval")
        assert list(flows) == ["t2i", "mmu"], "no lm path, no lm flow"
        items = {name: take(flow, 2) for name, flow in flows.items()}
        for item in items["t2i"] + items["mmu"]:
            assert torch.equal(item["image"], preprocess(picture(item["text"].rpartition("ASSISTANT: ")[2]), 32))
        return {name: [item["text"] for item in flow] for name, flow in items.items()}

    assert texts(1) == texts(2)
    assert texts(1)["t2i"][:5] == CAPTIONS[:5], "each once, in order"
    assert flows_of(world, {}, split="eval") == {}


def test_held_out_data_are_divided_between_processes(world, tmp_path):
    shard = write_shard(tmp_path / "heldout.tar", [sample(text) for text in CAPTIONS])
    settings, seen = {path_of("t2i", "eval"): shard, "training.batch_size_t2i": 3}, []
    for process in range(2):
        flow = flow_of(world, "t2i", settings, split="eval", process=process, num_processes=2)
        seen += [item["text"] for item in take(flow, 2)]
    assert sorted(seen) == sorted(CAPTIONS)


# ---- bad data ----


@pytest.mark.slow
def test_bad_data_are_counted_by_kind_and_capped(world, tmp_path):
    good = [sample(text) for text in CAPTIONS]
    bad = [good[0] | {"png": good[0]["png"][:70]}, good[1] | {"txt": b" "}, {"png": good[2]["png"]}, {"txt": b"words"}]
    write_shard(tmp_path / "a-000.tar", good * 8 + bad)
    data = write_shard(tmp_path / "a-001.tar", good).read_bytes()
    (tmp_path / "a-001.tar").write_bytes(data[: len(data) // 2])
    settings = {path_of("t2i"): tmp_path / "a-{000..001}.tar", f"{PARAMS}.max_skipped_fraction": 0.01}
    with pytest.raises(UserError, match=r"t2i: skipped \d+ of 2\d\d samples .*max_skipped_fraction 0\.01") as error:
        take(flow_of(world, "t2i", settings), 300)
    kinds = ("unreadable_image", "empty_text", "malformed_item", "truncated_shard")
    assert all(f"{kind} (such as " in str(error.value) for kind in kinds)
