"""The commands of docs/own_images.md, as far as the batches that the training would take."""

import re
import shlex

import torch

from common.config import TrainingConfig, load_config
from tests.training.tiny import CAPTIONS, build_flows, picture
from tools import make_shards


def test_the_documented_commands_lead_from_a_folder_to_batches(repository, tmp_path, monkeypatch, capsys):
    page = (repository / "docs/own_images.md").read_text().replace("\\\n", "")
    make, train = (shlex.split(line) for line in re.findall(r"^(?:python3|accelerate) .*", page, re.MULTILINE)[:2])
    assert make[:2] == ["python3", "tools/make_shards.py"]
    (tmp_path / "photos").mkdir()
    for number, caption in enumerate(CAPTIONS):
        picture(caption).resize((80, 70)).save(tmp_path / f"photos/{number}.jpg")
        (tmp_path / f"photos/{number}.txt").write_text(caption)
    monkeypatch.chdir(tmp_path)
    make_shards.main(make[2:])
    told = capsys.readouterr().out
    assert "11 samples in 1 shards" in told and "1 samples held out" in told
    script = train.index("training/train.py")
    assert (repository / train[train.index("--config_file") + 1]).is_file()
    config = load_config(train[script + 1 :], TrainingConfig)
    assert (repository / config.experiment.init_from / "config.json").is_file()
    flows, held = build_flows(config), build_flows(config, split="eval")
    batch = next(flows["t2i"])
    assert flows.keys() == {"t2i", "mmu"} == held.keys()
    assert len(batch) == 16 and {sample["text"] for sample in batch} <= set(CAPTIONS)
    assert {sample["image"].shape for sample in batch} == {torch.Size([3, 64, 64])}
    [heldout] = {sample["text"] for sample in next(held["t2i"])}
    assert heldout not in {sample["text"] for _ in range(4) for sample in next(flows["t2i"])}
