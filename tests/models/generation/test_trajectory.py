"""The recorder of image sampling: what it holds is what was sampled, and the model gives it the same probabilities."""

import pytest
import torch

from models import SamplingParameters
from models.generation.trajectory import Trajectory
from tests.models.generation.test_image import LONG, MASK, NUM_CODES, OFFSET, N, seeded, t2i_rows
from tests.parity.goldens import prompting, tiny_showo

TEXTS = ["w1 w2", LONG]
SETTINGS = {"timesteps": 5, "temperature": 1.0}


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


def sampled(model, known=None, **settings) -> tuple[torch.Tensor, Trajectory, list[torch.Tensor]]:
    ids, uncond_ids = t2i_rows(TEXTS, known)
    record, seen = Trajectory(), []
    codes = model.t2i_generate(
        ids,
        uncond_ids,
        generator=seeded(3),
        trajectory=record,
        callback=lambda _, codes: seen.append(codes),
        **SETTINGS | settings,
    )
    return codes, record, seen


@pytest.mark.parametrize("scale", [0.0, 2.0])
@pytest.mark.parametrize("partly_known", [False, True])
def test_it_replays_to_the_same_codes(model, scale, partly_known):
    known = torch.full((2, N), -1)
    known[:, :5] = 7
    codes, record, seen = sampled(model, known if partly_known else None, guidance_scale=scale)
    assert torch.equal(record.replay(), codes) and len(record.steps) == 5
    ids, uncond_ids = t2i_rows(TEXTS, known if partly_known else None)
    plain = model.t2i_generate(ids, uncond_ids, generator=seeded(3), guidance_scale=scale, **SETTINGS)
    assert torch.equal(codes, plain), "recording changes nothing"
    assert [step.sampled.tolist() for step in record.steps] == [one.tolist() for one in seen]
    assert [step.temperature for step in record.steps] == pytest.approx([0.8, 0.48, 0.192, 0.0384, 0])
    kept = torch.stack([step.kept for step in record.steps])  # (T, B, N)
    assert (kept.sum(0) == (record.states()[0] == MASK)).all(), "each unknown position becomes known once"
    assert kept.any(2).all(), "in every step some do"
    assert torch.equal(record.states()[-1], codes) and torch.equal(record.states()[0], record.steps[0].codes)


@pytest.mark.parametrize("sampling", [{"remask_rate": 0.5}, {"top_k": 3, "order": "halton"}, {"refresh_every": 2}])
def test_other_ways_to_sample_replay_as_well(model, sampling):
    """Also where known codes are masked again."""
    codes, record, _ = sampled(model, sampling=SamplingParameters(**sampling))
    assert torch.equal(record.replay(), codes)
    again = [(~one.unknown & one.remaining).any() for one in record.steps]
    assert any(again) == ("remask_rate" in sampling)
    best = [step.log_probs[step.unknown].exp() for step in record.steps]
    assert all((one > 0).all() for one in best), "nothing is sampled that was cut off"


def test_a_forward_pass_over_a_state_gives_the_recorded_probabilities(model):
    _, record, _ = sampled(model)
    for step in record.steps:
        image_ids = torch.where(step.unknown, MASK, step.codes + OFFSET)
        rows = prompting()((TEXTS, image_ids), "t2i_gen")
        logits = model(rows.input_ids, rows.attention_mask).logits[:, -N - 1 : -1, OFFSET : OFFSET + NUM_CODES]
        expected = logits.log_softmax(-1).gather(-1, step.sampled[..., None])[..., 0]
        torch.testing.assert_close(step.log_probs, expected.where(step.unknown, 0), rtol=1e-4, atol=1e-5)
        assert (step.log_probs[step.unknown] < 0).all()


def test_guided_logits_are_those_that_were_sampled_from(model):
    one, two = (sampled(model, guidance_scale=scale)[1].steps[0] for scale in (0.0, 3.0))
    assert torch.equal(one.codes, two.codes)
    assert not torch.allclose(one.log_probs, two.log_probs)
