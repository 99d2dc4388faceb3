"""A loss that is no number stops the run and says where it began."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor
from support import tiny

from pangu_locmoe.checkpoint.format import find_checkpoint, load_weights
from pangu_locmoe.cli import main
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.errors import DivergenceError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.train.loop import Trainer
from pangu_locmoe.train.step import LossScale


@pytest.mark.parametrize(
    "weight, layer", [("blocks.1.norm2.gamma", 1), ("query_layer.ffn.w_out", 2)]
)
def test_poisoned_weights_are_found_in_their_layer(tmp_path, weight, layer):
    config = tiny.tiny_config(
        train={"steps": 8}, checkpoint={"every": 2}, evaluation={"every": 8, "sequences": 1}
    )
    trainer = Trainer(config, prepare(config, False), tmp_path)
    advance = trainer._advance

    def poison_after_the_fifth_step():
        advance()
        if trainer.step == 5:
            (parameter,) = [p for p in trainer.model.get_parameters() if p.name == weight]
            array = parameter.asnumpy().copy()
            array.flat[0] = np.nan
            parameter.set_data(Tensor(array))

    trainer._advance = poison_after_the_fifth_step
    with pytest.raises(
        DivergenceError,
        match=rf"^step 6: loss nan, .* first in layer {layer}; last good checkpoint: .*/step-00000004; try",
    ):
        trainer.run(progress=False)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [1, 2, 3, 4, 5]
    model = PanguSigma(config)
    load_weights(find_checkpoint(tmp_path), model)
    assert all(np.isfinite(parameter.asnumpy()).all() for parameter in model.trainable_params())


def test_a_huge_learning_rate_is_one_line_and_exit_code_2(tmp_path, capsys):
    config = tiny.tiny_config(
        moe={"router": "hash"},
        train={"learning_rate": 1e30, "warmup_steps": 0},
        evaluation={"every": 12, "sequences": 1},
    )
    assert (
        main(
            [
                "train",
                str(tiny.write(config, tmp_path)),
                "--run-dir",
                str(tmp_path / "run"),
                "--no-progress",
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        error.startswith("pangu-locmoe: step 2: loss ")
        and "last good checkpoint: none yet; try a lower train.learning_rate" in error
    )


def test_a_divergence_at_the_last_step_is_seen_in_the_evaluation(tmp_path):
    config = tiny.tiny_config(
        moe={"router": "hash"},
        train={"steps": 1, "learning_rate": 1e30, "warmup_steps": 0},
        evaluation={"every": 1, "sequences": 1},
    )
    with pytest.raises(
        DivergenceError, match=r"^step 1: validation loss (nan|inf); last good checkpoint: none yet"
    ):
        Trainer(config, prepare(config, False), tmp_path).run(progress=False)


def test_an_overflow_that_no_loss_scale_can_prevent_is_a_divergence():
    """Halving stops at 1, and a step that is skipped there will be skipped for ever."""
    stepper = SimpleNamespace(loss_scale=LossScale(4.0, 10))
    said = []
    trainer = SimpleNamespace(stepper=stepper, _smallest_scale=False, _diverged=said.append)
    for wanted in (0, 0, 1):  # at 4, at 2, and at 1
        stepper.loss_scale.update(overflow=True)
        result = SimpleNamespace(
            losses={"loss": 1.0}, grad_norm=float("inf"), skipped=True, layer_sums=np.ones(3)
        )
        Trainer._check_finite(trainer, result)
        assert len(said) == wanted
    assert "gradient norm inf" in said[0]
