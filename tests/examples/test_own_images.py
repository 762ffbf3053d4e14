"""The commands of examples/README.md, as far as the batches that the training would take."""

import re
import shlex

import torch

from common.config import TrainingConfig, load_config
from tests.training.tiny import CAPTIONS, build_flows, picture
from tools import make_shards


def test_the_documented_commands_lead_from_a_folder_to_batches(repository, tmp_path, monkeypatch, capsys):
    block = re.search(r"```\n(.*?)```", (repository / "examples/README.md").read_text(), re.DOTALL)[1]
    make, train = (shlex.split(line) for line in block.replace("\\\n", "").splitlines())
    assert make[:2] == ["python3", "tools/make_shards.py"]
    (tmp_path / "photos").mkdir()
    for number, caption in enumerate(CAPTIONS):
        picture(caption).resize((80, 70)).save(tmp_path / f"photos/{number}.jpg")
        (tmp_path / f"photos/{number}.txt").write_text(caption)
    monkeypatch.chdir(tmp_path)
    make_shards.main(make[2:])
    assert "12 samples in 1 shards" in capsys.readouterr().out
    script = train.index("training/train.py")
    assert (repository / train[script - 1]).is_file()
    config = load_config(train[script + 1 :], TrainingConfig)
    assert (repository / config.experiment.init_from / "config.json").is_file()
    flows = build_flows(config) | build_flows(config, split="eval")
    batch = next(flows["t2i"])
    assert flows.keys() == {"t2i"} and len(batch) == 16 and {sample["text"] for sample in batch} <= set(CAPTIONS)
    assert {sample["image"].shape for sample in batch} == {torch.Size([3, 64, 64])}
