"""Routers that an Ascend device cannot run to their end."""

from __future__ import annotations

from mindspore import Tensor, ops

from pangu_locmoe.moe.routers.switch import SwitchRouter


class WithoutKernel(SwitchRouter):
    """Calls an operator that MindSpore has for CPUs and GPUs only."""

    def construct(self, x_TD, tokens_T, domains_T, noise, training):
        plan = super().construct(x_TD, tokens_T, domains_T, noise, training)
        cosine_T = plan["cosine_T"]
        return {**plan, "cosine_T": ops.polygamma(Tensor(1), ops.abs(cosine_T) + 1.0)}


class WithPython(SwitchRouter):
    """Calls NumPy on a tensor, which MindSpore does on the host in the middle of the graph."""

    def construct(self, x_TD, tokens_T, domains_T, noise, training):
        plan = super().construct(x_TD, tokens_T, domains_T, noise, training)
        return {**plan, "cosine_T": Tensor(plan["cosine_T"].asnumpy() * 2.0)}
