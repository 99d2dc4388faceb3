"""Routers that have one property of a hash table and lack another: what each of them is worth.

Letters: T tokens, D hidden, E experts.
"""

from __future__ import annotations

from typing import Any, Tuple

import numpy as np
from mindspore import Parameter, Tensor, ops

from pangu_locmoe.config import Config
from pangu_locmoe.moe.plan import RoutingPlan
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.moe.routers.hash import HashRouter
from pangu_locmoe.moe.routers.locmoe import LocMoERouter
from pangu_locmoe.moe.routers.switch import SwitchRouter
from pangu_locmoe.moe.token_table import TokenLookup, token_tables
from pangu_locmoe.nn.noise import Noise
from pangu_locmoe.train.callbacks import Callback, Row
from pangu_locmoe.train.step import StepResult

REDRAWN_EVERY = 50


class PositionHash(HashRouter):
    """Stable, balanced, at full weight, and blind to the token: its expert follows from its
    position in the sequence.
    """

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        self.length = config.model.seq_length

    def construct(
        self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, noise: Noise, training: bool
    ) -> RoutingPlan:
        positions_T = Tensor(np.arange(x_TD.shape[0], dtype=np.int32) % self.length)
        return super().construct(x_TD, positions_T, domains_T, noise, training)


class RedrawnHash(HashRouter):
    """Hash whose table is another one every REDRAWN_EVERY steps (`Redraw`): not stable."""

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        self.drawn_from = (context.token_counts_JV, context.allowed_JE)
        self.seed = [config.train.seed, 2, context.layer]

    def redraw(self, step: int) -> None:
        """Another table, as balanced as the first."""
        tables_JGV = token_tables(*self.drawn_from, [*self.seed, step])
        self.table.set_data(Tensor(tables_JGV.reshape(-1)))


class WeightedHash(LocMoERouter):
    """Hash's expert, scaled by GrAP's probability of it: not at full weight."""

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        tables_JGV = token_tables(
            context.token_counts_JV, context.allowed_JE, [config.train.seed, 2, context.layer]
        )
        self.lookup = TokenLookup(tables_JGV.shape)
        self.table = Parameter(Tensor(tables_JGV.reshape(-1)), name="table", requires_grad=False)

    def choose(
        self,
        scores_TX: Tensor,
        logits_TE: Tensor,
        probs_TE: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        expert_T = self.lookup(self.table, tokens_T, domains_T)[:, 0]
        one_hot_TE = ops.cast(
            ops.equal(ops.expand_dims(expert_T, 1), self.experts_E), probs_TE.dtype
        )
        weight_T = ops.reduce_sum(probs_TE * one_hot_TE, 1)
        return expert_T, one_hot_TE, weight_T, weight_T


class FrozenGate(SwitchRouter):
    """Switch whose gate stays as it was drawn: experts change hands only as the layers below do."""

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        self.w_ED.requires_grad = False


class Redraw(Callback):
    """Gives the `RedrawnHash` routers of a model, which is set once it is there, new tables."""

    model: Any = None

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        if step % REDRAWN_EVERY or self.model is None:
            return
        for layer in self.model.moe_layers.values():
            if isinstance(layer.router, RedrawnHash):
                layer.router.redraw(step)
