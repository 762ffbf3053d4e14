"""What a user can get wrong: one clear line, exit code 2, and what was there stays as it was.

Here are the refusals of the scripts and of `models/loading`, and that each script asks those who decide before it loads
anything; what can be wrong with a checkpoint's files is in tests/models/test_checkpoint_io.py.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import inference_mixed
import inference_mmu
import inference_t2i
from common.errors import UserError
from models import MAGVITv2, MAGVITv2Config, ShowoPipeline
from tests.parity.goldens import PHI, fill_
from tests.tiny import VQ_SIZES, showo_config, write_published

VQ = {"_class_name": "MAGVITv2"} | VQ_SIZES


@pytest.fixture
def refused(places, tmp_path, monkeypatch):
    """Runs a script that must refuse before it reads weights; returns its one line. Earlier results must survive."""
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    for name in ("0000.png", "grid.png"):
        (output_dir / name).write_text(name)
    (output_dir / "results.jsonl").write_text('{"file": "0000.png", "mode": "t2i"}\n')
    before = {path: path.read_bytes() for path in output_dir.iterdir()}

    def never(*args, **kwargs):
        pytest.fail("weights were read or a pipeline was built")

    monkeypatch.setattr("models.checkpoint_io.load_state_dict_folder", never)
    monkeypatch.setattr(ShowoPipeline, "__init__", never)

    def run(*arguments: str, script=inference_t2i) -> str:
        with pytest.raises(UserError) as error:
            script.main([f"config={places['demo']}", f"output_dir={output_dir}", *arguments])
        assert {path: path.read_bytes() for path in output_dir.iterdir()} == before
        message = str(error.value)
        assert message and "\n" not in message and len(message) < 700
        return message

    return run


@pytest.fixture
def names(places, tmp_path) -> dict:
    """The places, and what is wrong with others, for the arguments below."""
    (tmp_path / "prompts.txt").write_text("a dog\n[PAD] a cat\n")
    (tmp_path / "broken.png").write_bytes(places["image"].read_bytes()[:100])
    Image.new("L", (48, 40)).save(tmp_path / "black.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no image")
    write_published(tmp_path / "few", VQ | {"code_bits": 4}, {})
    write_published(tmp_path / "fine", VQ | {"stem_patch_size": 2}, {})
    write_published(tmp_path / "words", showo_config(llm_vocab_size=117, vocab_size=192, mask_token_id=191), {})
    (shutil.copytree(PHI, tmp_path / "damaged") / "tokenizer.json").write_text("{")
    return places | {"tmp": tmp_path, "phi": PHI}


T2I = "mode=t2i prompt=w1 "
INPAINT = "mode=inpainting prompt=w1 image_path={image} inpainting_mask_path={mask} "
EXTEND = "mode=extrapolation prompt=w1 extra_direction=left image_path={image} "
ASK = "question=w1 mmu_image_root={pictures} "
SIGMOID = "mask_schedule.schedule=sigmoid "
SHOWO, TOKENIZER = "model.showo.pretrained_model_path=", "model.vq_model.vq_model_name="


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # settings
        ("prompt=w1", "mode is not given; add mode=t2i, mode=inpainting, mode=extrapolation"),
        (T2I + "guidance_scale=nan", "guidance_scale is nan; it must be from 0 to"),
        (T2I + "generation_timesteps=1e12", "generation_timesteps is 1000000000000; it must be from 1 to"),
        (T2I + "num_images_per_prompt=99999999", "num_images_per_prompt is 99999999; it must be from 1"),
        (T2I + "seed=-1", "seed is -1; it must be from 0"),
        (T2I + "image.background=no-colour", "image.background is 'no-colour'; it must be a colour"),
        (T2I + "image.background=", "image.background is ''; it must be a colour"),
        (T2I + "image.exif=turn", "image.exif is 'turn'; allowed: ignore, apply"),
        (T2I + "device=tpu9", "device=tpu9 .*give cpu"),
        (T2I + "mask_schedule.schedule=sine", "mask_schedule: .*'sine'.*cosine"),
        (T2I + SIGMOID + "mask_schedule.params.tau=0", "mask_schedule: params {'tau': 0} .*division by zero"),
        (T2I + SIGMOID + "mask_schedule.params.end=-3", "mask_schedule: params {'end': -3} .* give no number"),
        (T2I + SIGMOID + "mask_schedule.params.start=x", "mask_schedule: params {'start': 'x'} .*give numbers"),
        (T2I + SIGMOID + "mask_schedule.params.no=1", "mask_schedule: params {'no': 1} .*unexpected keyword"),
        (T2I + "dataset.preprocessing.resolution=40", "resolution=40 .*num_vq_tokens=16.* 32 x 32 pixels"),
        (T2I + "model.showo.num_vq_tokens=15", "num_vq_tokens is 15.*square"),
        (T2I + "model.showo.vocab_size=200", "model.showo: vocab_size is 200.*193"),
        (T2I + SHOWO + "null", "pretrained_model_path is not given"),
        (  # without the hub
            T2I + "config=configs/showo_demo.yaml dataset.preprocessing.resolution=512",
            "resolution=512 does not match model.showo.num_vq_tokens=256.*256 x 256 pixels",
        ),
        # prompts, directions, masks, images
        ("mode=t2i validation_prompts_file={tmp}/prompts.txt", r"special token \[PAD\]"),
        (INPAINT + "prompt=<|soi|>", r"special token <\|soi\|>"),
        (INPAINT + "prompt=", "prompt is not given"),
        (INPAINT + "image_path=", "image_path is not given"),
        (INPAINT + "inpainting_mask_path=", "inpainting_mask_path is not given"),
        (INPAINT + "image_path={tmp}/none.png", "none.png does not exist"),
        (INPAINT + "inpainting_mask_path={tmp}/broken.png", "broken.png cannot be read"),
        (INPAINT + "inpainting_mask_path={tmp}/black.png", "no white region"),
        (EXTEND + "prompt=<|soi|>", r"special token <\|soi\|>"),
        (EXTEND + "prompt=", "prompt is not given"),
        (EXTEND + "extra_direction=", "extra_direction is not given"),
        (EXTEND + "offset=2", "offset is 2.* from -1 to 1"),
        (EXTEND + "offset=99999999999", "offset is 99999999999; it must be from"),
        (EXTEND + "image_path={tmp}/broken.png", "broken.png cannot be read"),
        # questions
        ("mmu_image_root={pictures}", "question is not given"),
        (ASK + "question=<|soi|>", r"special token <\|soi\|>"),
        ("question=w1", "mmu_image_root is not given"),
        (ASK + "max_new_tokens=9999999", "max_new_tokens is 9999999; it must be from 1 to"),
        (ASK + "mmu_image_root=no-folder", "no-folder does not exist"),
        (ASK + "mmu_image_root={tmp}/empty", "no readable image"),
        (ASK + "mmu_image_root={tmp}/broken.png", "broken.png cannot be read"),
        # checkpoints of another kind or size, and tokenizers
        (T2I + SHOWO + "{magvitv2}", "holds a 'MAGVITv2' checkpoint, expected 'Showo'"),
        (T2I + TOKENIZER + "{showo}", "holds a 'Showo' checkpoint, expected 'MAGVITv2'"),
        (T2I + "config={demo_clip} model.clip_vit_name={phi}", "'phi' model, expected a CLIP"),
        (T2I + SHOWO + "{showo_clip}", "model.showo.w_clip_vit is False, but the checkpoint"),
        (T2I + TOKENIZER + "{tmp}/few", "has 16 codes, but model.showo.codebook_size is 64"),
        (T2I + TOKENIZER + "{tmp}/fine", "resolution=32 does not match.*16 x 16 pixels"),
        (
            T2I + SHOWO + "{tmp}/words model.showo.llm_vocab_size=117 model.showo.vocab_size=192",
            "has 118 tokens, but model.showo.llm_vocab_size is 117",
        ),
        (T2I + "model.showo.llm_model_path={tmp}/damaged", "copy its files again"),
        # names on the hub, which cannot be reached
        (T2I + SHOWO + "a/showo", "'a/showo' is not a local folder and could not be fetched from the hub"),
        (T2I + TOKENIZER + "a/vq", "'a/vq' is not a local folder"),
        (T2I + "model.showo.llm_model_path=microsoft/phi-1_5", "'microsoft/phi-1_5' is not a local folder"),
        (T2I + "config={demo_clip} model.clip_vit_name=openai/clip", "'openai/clip' is not a local folder"),
        # where results go
        (T2I + "output_dir={tmp}/black.png/below", "output_dir=.* is not a folder"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(refused, names, arguments, message):
    script = inference_mmu if re.search("question|mmu_image_root", arguments) else inference_t2i
    assert re.search(message, refused(*arguments.format(**names).split(), script=script))


EDIT, STORY = "mode=edit prompt=w1 image_path={image} ", "mode=story prompt=w1 "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prompt=w1", "mode is not given; add mode=edit, mode=story, mode=free"),
        ("mode=t2i", "mode is 't2i'; allowed: edit, story, free"),
        (STORY + "question=w1", "question has no effect on inference_mixed.py; leave it out"),
        (STORY + "nul=all", "unknown key nul; the nearest known key is null"),
        (STORY + "null=images", "null is 'images'; allowed: text, all"),
        (STORY + "num_images=0", "num_images is 0; it must be from 1 to 100"),
        (STORY + "text_guidance_scale=2", "text_guidance_scale is given and image_guidance_scale is not; give both"),
        (
            STORY + "text_guidance_scale=2 image_guidance_scale=1 null=all",
            "null has no effect with text_guidance_scale",
        ),
        (STORY + "config={demo_clip}", "w_clip_vit is true, but documents need a model that sees images as codes"),
        (STORY + "image_path={image}", "image_path has no effect on mode=story"),
        (STORY + "prompt=<|soi|>", r"special token <\|soi\|>"),
        ("mode=story", "prompt is not given; add prompt"),
        ("mode=edit prompt=w1", "image_path is not given"),
        ("mode=free", "nothing to go on with is given; add prompt=.* or documents=FILE.jsonl"),
        (EDIT + "prompt=", "prompt is not given"),
        (EDIT + "image_path={tmp}/none.png", "none.png does not exist"),
        (EDIT + "image_path={tmp}/empty", "image_path=.*empty contains no readable image"),
        (EDIT + "image_path={tmp}/broken.png", "broken.png cannot be read"),
        (EDIT + "documents={tmp}/empty", "documents holds whole documents; leave prompt and image_path out"),
        ("mode=free documents={tmp}/none.jsonl", "documents=.*none.jsonl does not exist"),
        (STORY + SHOWO + "{magvitv2}", "holds a 'MAGVITv2' checkpoint, expected 'Showo'"),
        (STORY + "output_dir={tmp}/black.png/below", "output_dir=.* is not a folder"),
    ],
)
def test_a_mistake_with_documents_is_one_line_before_anything_is_loaded(refused, names, arguments, message):
    assert re.search(message, refused(*arguments.format(**names).split(), script=inference_mixed))


@pytest.mark.parametrize(
    ("mode", "text", "message"),
    [
        ("free", "{", "record 0.* is no valid JSON"),
        ("free", '{"texts": ["w1"]}', r"record 0 has no segments; give \{'segments'"),
        ("free", '{"segments": []}', "record 0 has no segment; give a text or an image"),
        ("free", '{"segments": [{"text": "w1", "image": "c.png"}]}', "segment 0 needs a text or an image"),
        ("free", '{"segments": [{"text": " "}]}', "segment 0"),
        ("free", '{"segments": [{"image": [1, 2]}]}', "an image is no text; give the path of its file"),
        ("free", '{"segments": [{"image": "none.png"}]}', "names none.png, which is not in"),
        ("free", '{"segments": [{"image": "broken.png"}]}', "broken.png cannot be read"),
        ("free", '{"segments": [{"text": "w1 [PAD]"}]}', r"special token \[PAD\]"),
        (
            "story",
            '{"segments": [{"image": "black.png"}]}',
            "record 0 ends with an image; mode=story goes on after a text",
        ),
        ("edit", '{"segments": [{"text": "w1"}]}', "record 0 has no image to edit; give one, or mode=story"),
        ("free", "", "one a line|empty|no "),
    ],
)
def test_a_document_that_cannot_be_gone_on_with_is_named(refused, names, mode, text, message):
    file = names["tmp"] / "begun.jsonl"
    file.write_text(text)
    assert re.search(message, refused(f"mode={mode}", f"documents={file}", script=inference_mixed))


def test_a_question_beyond_the_models_positions_is_refused_before_anything_is_computed(places, tmp_path, capsys):
    given = [f"config={places['demo']}", f"output_dir={tmp_path}/out", f"mmu_image_root={places['pictures']}"]
    with pytest.raises(UserError, match=r"question 'w1 w1.*than the 1024 that the model knows; shorten the question"):
        inference_mmu.main([*given, f"question={'w1 ' * 20_000}"])
    with pytest.raises(UserError, match=r"max_new_tokens=1020.*; give at most max_new_tokens=1002$"):
        inference_mmu.main([*given, "question=w1", "max_new_tokens=1020"])
    assert not (tmp_path / "out").exists()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""  # nor a library's warning


@pytest.mark.slow
def test_more_codes_than_the_model_knows(places, tmp_path):
    """Such a tokenizer can decode, but the codes that it makes of images would lie outside the vocabulary."""
    sizes = VQ_SIZES | {"code_bits": 13}
    many = write_published(tmp_path / "many", VQ | sizes, fill_(MAGVITv2(MAGVITv2Config(**sizes))).state_dict())
    given = [f"config={places['demo']}", f"output_dir={tmp_path}/out", TOKENIZER + str(many)]
    inference_t2i.main([*given, *T2I.split()])
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    with pytest.raises(UserError, match="the model has only 64 codes"):
        inference_mmu.main([*given, "question=w1", f"mmu_image_root={places['pictures']}"])
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("script", ["inference_t2i.py", "inference_mmu.py"])
def test_exit_code_and_one_line_from_another_folder(tmp_path, repository, script):
    command = [sys.executable, str(repository / script), "config=configs/showo_demo.yaml", "generation_timestep=4"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert "nearest known key is generation_timesteps" in done.stderr
    assert not list(tmp_path.iterdir())
