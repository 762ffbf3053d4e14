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
from PIL import Image
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
from training.data.captions import CAPTION_INSTRUCTIONS
from training.data.flows import end_together
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


def test_held_out_paths_are_checked_too(world):
    config = config_of(world, overrides={path_of("mmu", "eval"): "/nowhere/b.tar"})
    with pytest.raises(UserError, match=r"eval_mmu_shards_path_or_url: 1 of 1 files do not exist: /nowhere/b\.tar"):
        check_data(config)
    check_data(config_of(world))


def test_a_flow_of_batch_size_0_needs_no_data(world):
    off = {"training.batch_size_mmu": 0, path_of("mmu"): "/nowhere.tar"}
    assert list(flows_of(world, off)) == ["t2i", "lm"]
    all_off = {f"training.batch_size_{flow}": 0 for flow in FLOWS}
    with pytest.raises(UserError, match="all 0"):
        flows_of(world, all_off)


@pytest.mark.parametrize(
    ("flow", "kind", "file"),
    [("t2i", "t2i", "texts.parquet"), ("t2i", "t2i_parquet", "train-000000.tar"), ("lm", "lm", "train-000000.tar")]
    + [("t2i", "imagenet1k", "texts.parquet"), ("mmu", "llava_tuning", "texts.parquet")],
)
def test_files_of_another_kind_are_refused_by_name(world, flow, kind, file):
    key = {"t2i": "gen_type", "mmu": "und_type"}.get(flow)
    overrides = {path_of(flow): world / file} | ({f"dataset.{key}": kind} if key else {})
    with pytest.raises(UserError, match=rf"{path_of(flow)}: .*{kind}.* reads files of one sort of .*; got .*{file}"):
        flows_of(world, overrides)


@pytest.mark.parametrize(
    ("flow", "address"),
    [
        ("lm", "https://host/a.jsonl"),
        ("lm", "pipe:cat a.parquet"),
        ("lm", "pipe:cat a"),
        ("t2i", "https://h/a.parquet"),
    ],
)
def test_only_shards_are_read_from_addresses(world, flow, address):
    with pytest.raises(UserError, match=re.escape(f"got {address}; only shards can be read from an address: fetch")):
        check_data(config_of(world, overrides={path_of(flow): address}))
    check_data(config_of(world, overrides={path_of("t2i"): "https://host/a.tar", path_of("mmu"): "pipe:aws cp s3://a"}))


def test_a_flow_reads_files_of_one_sort(world):
    (world / "more.txt").write_text("words")
    mixed = {path_of("lm"): f"[{world / 'texts.parquet'}, {world / 'more.txt'}]"}
    with pytest.raises(UserError, match=r"one sort of \.parquet, \.jsonl, \.txt; got .*parquet and .*more\.txt"):
        flow_of(world, "lm", mixed)


def test_captions_from_elsewhere_need_the_key_that_turns_them_on(world):
    with pytest.raises(UserError, match="external_laion12m_caption_path has no effect without .*external_caption_path"):
        flows_of(world, {f"{PARAMS}.external_laion12m_caption_path": world})
    assert flows_of(world, {f"{PARAMS}.external_laion12m_caption_path": ""}), "as the published files leave it"


# ---- every kind ----


def test_shards(world):
    flows = flows_of(world, {f"{PREPROCESSING}.resolution": 16})
    assert list(flows) == list(FLOWS)
    batch = next(flows["t2i"])
    pixels, texts = stack(batch, "image"), [item["text"] for item in batch]
    assert pixels.shape == (4, 3, 16, 16) and -1 <= pixels.min() < pixels.max() <= 1
    assert set(texts) <= set(CAPTIONS)
    assert all("\n" not in text for text in next(flows["lm"])) and len(next(flows["lm"])) == 1
    answers = [item["text"] for item in next(flows["mmu"])]
    assert len(answers) == 2 and all(text.startswith("USER: \n") for text in answers)


@pytest.mark.parametrize("flow", ["t2i", "mmu"])
@pytest.mark.parametrize("form", ["bytes", "struct", "path", "own name"])
def test_parquet_with_pictures(world, tmp_path, flow, form):
    (tmp_path / "pictures").mkdir()
    for number, text in enumerate(CAPTIONS):
        picture(text).save(tmp_path / "pictures" / f"{number}.png")
    data = [image_bytes(picture(text)) for text in CAPTIONS]
    names = [f"{number}.png" for number in range(len(CAPTIONS))]
    column = {
        "bytes": ("image", data),
        "struct": ("image", [{"bytes": d, "path": "gone.png"} for d in data]),
        "path": ("image_path", names),
        "own name": ("photo", data),
    }[form]
    text_column = "words" if form == "own name" else "caption"
    table = pyarrow.table({column[0]: column[1], text_column: CAPTIONS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    settings = {path_of(flow): tmp_path / "a.parquet", f"{PARAMS}.add_caption_prompt": False}
    settings |= {"dataset.gen_type": "t2i_parquet", "dataset.und_type": "captioning_parquet"}
    if form == "own name":
        with pytest.raises(
            UserError, match="has no column .*its columns are photo, words; name one by dataset.*image_col"
        ):
            flow_of(world, flow, settings)
        settings |= {f"{PARAMS}.image_column": "photo", f"{PARAMS}.text_column": "words"}
    if form == "path":
        settings[f"{PARAMS}.train_{flow}_image_root"] = tmp_path / "pictures"
    size = config_of(world).training[f"batch_size_{flow}"]
    items = take(flow_of(world, flow, settings), len(CAPTIONS) // size)
    assert sorted(item["text"] for item in items) == sorted(CAPTIONS), "one epoch"
    for item in items:
        assert torch.equal(item["image"], preprocess(picture(item["text"]), 32))


@pytest.mark.parametrize("below", ["", "train"])
def test_imagenet(world, tmp_path, below):
    for wnid, text in (("n00000001", CAPTIONS[0]), ("n00000002", CAPTIONS[1])):
        (tmp_path / below / wnid).mkdir(parents=True)
        for number in range(4):
            picture(text).save(tmp_path / below / wnid / f"{wnid}_{number}.JPEG", quality=100)
    (tmp_path / "LOC_synset_mapping.txt").write_text(f"n00000001 {CAPTIONS[0]}, x\nn00000002 {CAPTIONS[1]}\n")
    settings = {"dataset.gen_type": "imagenet1k", path_of("t2i"): tmp_path}
    items = take(flow_of(world, "t2i", settings), 2)
    assert sorted(item["text"] for item in items) == sorted(CAPTIONS[:2] * 4)
    for item in items:
        assert (item["image"] - preprocess(picture(item["text"]), 32)).abs().mean() < 0.1
    (tmp_path / "names.txt").write_text("n00000001 one\nn00000002 two")
    named = flow_of(world, "t2i", settings | {f"{PARAMS}.class_names_path": tmp_path / "names.txt"})
    assert {item["text"] for item in take(named, 2)} == {"one", "two"}
    with pytest.raises(UserError, match="class_names_path: 1 of 1 files do not exist"):
        flow_of(world, "t2i", settings | {f"{PARAMS}.class_names_path": "/nowhere.txt"})


def test_imagenet_from_shards(world):
    flow = flow_of(world, "t2i", {"dataset.gen_type": "imagenet1k", path_of("t2i"): world / "train-000000.tar"})
    assert {item["text"] for item in take(flow, 2)} <= set(CAPTIONS)


def llava(tmp_path, count: int = 6) -> dict:
    records = []
    for number, text in enumerate(CAPTIONS[:count]):
        picture(text).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (tmp_path / "llava.json").write_text(json.dumps([*records, {"id": "no picture", "conversations": turns}]))
    return {path_of("mmu"): tmp_path / "llava.json", f"{PARAMS}.train_mmu_image_root": tmp_path}


@pytest.mark.parametrize("kind", ["llava_pretrain", "llava_tuning"])
@pytest.mark.parametrize("clip", [False, True])
def test_llava(world, tmp_path, tokenizer, processor, kind, clip):
    settings = llava(tmp_path) | {"dataset.und_type": kind, f"{PREPROCESSING}.max_seq_length": 40}
    image_processor = processor if clip else None
    flow = flow_of(world, "mmu", settings, tokenizer=tokenizer, image_processor=image_processor)
    items = take(flow, 3)
    texts = {tokenizer.decode(item["input_ids"]).removesuffix(tokenizer.eos_token) for item in items}
    answers = {
        f"{text}\n" if clip and kind == "llava_pretrain" else f"USER: What? ASSISTANT: {text}" for text in CAPTIONS[:6]
    }
    assert {text.replace(" ", "") for text in texts} == {text.replace(" ", "") for text in answers}, "one epoch"
    for item in items:
        assert item.keys() == {"pixel_values" if clip else "image", "input_ids", "labels", "key"}
        assert item["labels"].shape == item["input_ids"].shape and (item["labels"] != -100).any()
    assert stack(next(flow), "pixel_values" if clip else "image").shape == ((2, 3, 24, 24) if clip else (2, 3, 32, 32))


def test_llava_as_a_chat(world, tmp_path, tokenizer):
    settings = llava(tmp_path) | {"dataset.und_type": "llava_tuning", f"{PREPROCESSING}.max_seq_length": 80}
    settings["conversation"] = "chat"
    chat = UniversalPrompting(qwen_like()).tokenizer
    (item, _) = next(flow_of(world, "mmu", settings, tokenizer=chat))
    assert "<|im_start|>user\nWhat?<|im_end|>\n" in chat.decode(item["input_ids"])
    assert chat.decode(item["labels"][item["labels"] != -100]).endswith("<|im_end|>")
    with pytest.raises(UserError, match="conversation=chat: the tokenizer has no chat template"):
        flow_of(world, "mmu", settings, tokenizer=tokenizer)


def test_llava_from_shards(world, tmp_path, tokenizer):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A square."}]
    content = json.dumps({"image": "elsewhere.png", "conversations": turns}).encode()
    shard = write_shard(tmp_path / "a.tar", [sample(text) | {"json": content} for text in CAPTIONS])
    settings = {"dataset.und_type": "llava_tuning", path_of("mmu"): shard, f"{PREPROCESSING}.max_seq_length": 40}
    (item, _) = next(flow_of(world, "mmu", settings, tokenizer=tokenizer))
    assert item["image"].shape == (3, 32, 32) and "input_ids" in item


@pytest.mark.parametrize("form", ["parquet", "jsonl", "txt"])
def test_language(world, tmp_path, form):
    texts = [f"document {i}\nof two lines" for i in range(6)]
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        write_texts(path, texts, column="body", row_group_size=4)
    else:
        lines = [json.dumps({"body": text}) for text in texts]
        path.write_text("\n".join(lines) if form == "jsonl" else "\n\n".join(texts))
    if form != "txt":
        with pytest.raises(
            UserError, match="has no column 'content'; its columns are body; .*dataset.params.lm_column"
        ):
            flow_of(world, "lm", {path_of("lm"): path})
    items = take(flow_of(world, "lm", {path_of("lm"): tmp_path, f"{PARAMS}.lm_column": "body"}), 6)
    joint = " " if form == "txt" else ""
    assert sorted(items) == [f"document {i}{joint}of two lines" for i in range(6)]


# ---- codes ----


def code_shard(folder, name: str = "codes", **manifest) -> dict:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(16, dtype=np.uint16))
    samples = [{"codes.npy": buffer.getvalue(), "txt": text.encode()} for text in CAPTIONS]
    shard = write_shard(folder / f"{name}-000000.tar", samples)
    sizes = {"resolution": 32, "num_vq_tokens": 16, "codebook_size": 64, "tokenizer": "tiny"} | manifest
    (folder / f"{name}-manifest.json").write_text(json.dumps({"shards": [], "samples": len(samples)} | sizes))
    return {path_of("t2i"): shard, path_of("mmu"): shard}


def test_shards_of_codes_serve_in_place_of_pixels(world, tmp_path):
    flows = flows_of(world, code_shard(tmp_path))
    for name, size in (("t2i", 4), ("mmu", 2)):
        batch = next(flows[name])
        assert stack(batch, "codes").tolist() == [list(range(16))] * size
        assert all(item.keys() == {"codes", "text", "key"} for item in batch)


def test_a_manifest_for_another_resolution_is_a_clear_mistake(world, tmp_path):
    with pytest.raises(
        UserError, match="codes-manifest.json: these codes were made for resolution 64, here 32; num_vq"
    ):
        flows_of(world, code_shard(tmp_path, resolution=64, num_vq_tokens=64))


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("setting", [{"random_flip": True}, {"und_random_flip": True}, {"und_jitter": 0.1}])
def test_codes_cannot_be_mirrored_or_moved(world, tmp_path, setting, with_manifest):
    settings = code_shard(tmp_path) | {f"{PREPROCESSING}.{key}": value for key, value in setting.items()}
    if not with_manifest:
        (tmp_path / "codes-manifest.json").unlink()
    with pytest.raises(UserError, match="codes cannot be mirrored or moved; turn .*random_flip.* off"):
        next(flow_of(world, "mmu", settings))


def test_the_clip_branch_needs_pixels(world, tmp_path, processor):
    with pytest.raises(UserError, match="the CLIP-ViT branch sees pixels"):
        flow_of(world, "mmu", code_shard(tmp_path), image_processor=processor)
    assert next(flow_of(world, "t2i", code_shard(tmp_path), image_processor=processor))[0]["codes"].shape == (16,)


# ---- texts and augmentation ----


def test_the_instruction_can_be_left_out_and_t2i_never_has_it(world):
    flows = flows_of(world, {f"{PARAMS}.add_caption_prompt": False})
    assert {item["text"] for name in ("t2i", "mmu") for item in next(flows[name])} <= set(CAPTIONS)


def test_captions_from_elsewhere_reach_both_flows(world, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"The image features thing {number}. More of it.")
    shard = write_shard(tmp_path / "a.tar", [sample(CAPTIONS[0]) for _ in range(4)])
    with tarfile.open(tmp_path / "sa.tar", "w") as archive, tarfile.open(shard) as other:
        for member in other:
            content = other.extractfile(member)
            number, suffix = re.fullmatch(r"a-00(\d)\.(\w+)", member.name).groups()
            member.name = f"SA1B/{number}.{suffix}"
            archive.addfile(member, content)
    settings = {path_of(name): tmp_path / "sa.tar" for name in ("t2i", "mmu")}
    flows = flows_of(world, settings | {f"{PARAMS}.external_caption_path": tmp_path})
    drawn = {re.sub(r"\d", "N", item["text"]) for item in take(flows["t2i"], 12)}
    assert drawn == {"thing N", "thing N. More of it."}
    for item in take(flows["mmu"], 3):
        instruction, caption = re.fullmatch(r"USER: \n(.+) ASSISTANT: (.+)", item["text"]).groups()
        assert instruction in CAPTION_INSTRUCTIONS and re.fullmatch(
            r"The image features thing \d\. More of it\.", caption
        )


def test_augmentation_of_the_mmu_flow_leaves_t2i_pictures_alone(world):
    plain = {image_bytes(picture(text)) for text in CAPTIONS}
    plain = {preprocess(Image.open(io.BytesIO(data)).convert("RGB"), 32).numpy().tobytes() for data in plain}
    flows = flows_of(world, {f"{PREPROCESSING}.und_jitter": 0.2})
    t2i, mmu = ([item["image"].numpy().tobytes() for item in take(flows[name], 3)] for name in ("t2i", "mmu"))
    assert set(t2i) <= plain and not set(mmu) & plain


# ---- shares and epochs ----


def test_processes_and_flows_have_data_of_their_own(world):
    def captions(process, name, seed=10086):
        flow = flows_of(world, {"training.seed": seed}, process=process, num_processes=2)[name]
        return [item["text"][-24:] for item in take(flow, 5)]

    assert captions(0, "t2i") == captions(0, "t2i")
    assert captions(0, "t2i") != captions(1, "t2i")
    assert captions(0, "t2i") != captions(0, "t2i", seed=1)
    assert captions(0, "t2i")[:10] != captions(0, "mmu")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_of_a_finite_set_is_divided_between_processes(world, tmp_path, tokenizer, num_workers):
    settings = llava(tmp_path, 12) | {"dataset.und_type": "llava_tuning", f"{PREPROCESSING}.max_seq_length": 40}
    settings[f"{PARAMS}.num_workers"] = num_workers
    seen = []
    for process in range(3):
        flow = flow_of(world, "mmu", settings, tokenizer=tokenizer, process=process, num_processes=3)
        seen += [item["image"].numpy().tobytes() for item in take(flow, 2)]
        flow.close()
    assert len(set(seen)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_continues_where_it_stood(world, num_workers, name):
    settings = {f"{PARAMS}.num_workers": num_workers}

    def taken(flow, count):
        return [item if name == "lm" else (item["text"], item["image"].sum().item()) for item in take(flow, count)]

    whole = flow_of(world, name, settings)
    expected = taken(whole, 9)
    first = flow_of(world, name, settings)
    begin = taken(first, 4)
    second = flow_of(world, name, settings)
    second.load_state_dict(first.state_dict())
    assert begin + taken(second, 5) == expected
    for flow in (whole, first, second):
        flow.close()


def test_published_limits_make_epochs(world):
    limits = {"experiment.max_train_examples_t2i": 100, "experiment.max_train_examples_mmu": 20}
    flows = flows_of(world, limits, num_processes=2)
    assert {name: flow.source.samples for name, flow in flows.items()} == {"t2i": 100, "mmu": 20, "lm": 12}
    assert [flows[name].batches_per_epoch for name in ("t2i", "lm", "mmu")] == [13, 6, 5]
    flows = flows_of(world, limits | {"dataset.combined_loader_mode": "min_size"}, num_processes=2)
    assert {name: flow.source.samples for name, flow in flows.items()} == {"t2i": 40, "mmu": 20, "lm": 10}
    assert {flow.batches_per_epoch for flow in flows.values()} == {5}, "all end with the shortest"


def test_flows_without_an_end_follow_the_others():
    t2i, mmu = Resampled(iter), Resampled(iter)
    end_together({t2i: 4, mmu: 2})
    assert t2i.samples is mmu.samples is None
    mmu.samples = 30
    end_together({t2i: 4, mmu: 2})
    assert t2i.samples == 60


# ---- held-out data ----


def test_held_out_flows_are_the_same_in_every_run_and_plain(world, tmp_path, tokenizer):
    shard = write_shard(tmp_path / "heldout.tar", [sample(text) for text in CAPTIONS[:5]])
    settings = {path_of("t2i", "eval"): shard, path_of("mmu", "eval"): shard, f"{PARAMS}.num_workers": 2}
    settings |= {f"{PREPROCESSING}.random_flip": True, f"{PREPROCESSING}.und_jitter": 0.2}

    def evaluated(seed) -> dict:
        flows = flows_of(world, settings | {"training.seed": seed}, split="eval")
        assert list(flows) == ["t2i", "mmu"], "no lm path, no lm flow"
        return {name: take(flow, 2) for name, flow in flows.items()}

    first, second = evaluated(1), evaluated(2)
    for name in first:
        assert [item["text"] for item in first[name]] == [item["text"] for item in second[name]]
    for item in first["t2i"]:
        assert torch.equal(item["image"], preprocess(picture(item["text"]), 32))
    for item in first["mmu"]:
        assert torch.equal(item["image"], preprocess(picture(item["text"].rpartition("ASSISTANT: ")[2]), 32))
    assert [item["text"] for item in first["t2i"]][:5] == CAPTIONS[:5], "each once, in order"
    assert flows_of(world, {}, split="eval") == {}


def test_held_out_data_are_divided_between_processes(world, tmp_path):
    shard = write_shard(tmp_path / "heldout.tar", [sample(text) for text in CAPTIONS])
    settings = {path_of("t2i", "eval"): shard, "training.batch_size_t2i": 3}
    shares = [
        {item["text"] for item in take(flows_of(world, settings, split="eval", process=p, num_processes=2)["t2i"], 2)}
        for p in range(2)
    ]
    assert len(shares[0]) == len(shares[1]) == 6 and not shares[0] & shares[1]


# ---- bad data ----


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_data_are_counted_by_kind_and_capped(world, tmp_path, num_workers):
    good = [sample(text) for text in CAPTIONS]
    bad = [good[0] | {"png": good[0]["png"][:70]}, good[1] | {"txt": b" "}, {"png": good[2]["png"]}, {"txt": b"words"}]
    write_shard(tmp_path / "a-000.tar", good * 8 + bad)
    data = write_shard(tmp_path / "a-001.tar", good).read_bytes()
    (tmp_path / "a-001.tar").write_bytes(data[: len(data) // 2])
    settings = {path_of("t2i"): tmp_path / "a-{000..001}.tar", f"{PARAMS}.num_workers": num_workers}
    # a lost shard counts as many samples as whole ones have; here it was smaller, so more than half seem to be lost
    flow = flow_of(world, "t2i", settings | {f"{PARAMS}.max_skipped_fraction": 0.9})
    assert len(take(flow, 300)) == 1200
    assert set(flow.skipped) == {"unreadable_image", "empty_text", "malformed_item", "truncated_shard"}
    assert flow.seen == 1200 + flow.skipped.total()
    flow.close()
    with pytest.raises(UserError, match=r"t2i: skipped \d+ of 2\d\d samples .*max_skipped_fraction 0\.01") as error:
        take(flow_of(world, "t2i", settings | {f"{PARAMS}.max_skipped_fraction": 0.01}), 300)
    assert "empty_text (such as a-000-" in str(error.value)


def test_a_shard_that_goes_during_the_run_is_counted(world, tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"a-{number}.tar", [sample(text) for text in CAPTIONS])
    settings = {path_of("t2i"): tmp_path / "a-{0..1}.tar", f"{PARAMS}.max_skipped_fraction": 0.9}
    flow = flow_of(world, "t2i", settings)
    next(flow)
    (tmp_path / "a-1.tar").unlink()
    take(flow, 30)
    assert flow.skipped["missing_file"] > 0
