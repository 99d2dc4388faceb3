"""Level 1 of the routing: a domain's tokens may only go to the experts of its group
(PanGu-Sigma, RRE).
"""

from __future__ import annotations

import numpy as np

from pangu_locmoe.config import Config


def group_sizes(config: Config) -> tuple[int, ...]:
    """Experts in each domain's group, in the order of `config.domains`; equal parts unless the
    YAML says otherwise.
    """
    domains = config.domains
    sizes = config.moe.group_sizes
    if sizes is None:
        return (config.moe.num_experts // len(domains),) * len(domains)
    return tuple(sizes[domain] for domain in domains)


def allowed_experts(config: Config) -> np.ndarray:
    """Which experts each domain may use, bool [J, E]: contiguous groups with `levels: 2`, all with
    `levels: 1`.

    Without any data source there is one nameless domain that may use every expert.
    """
    num_domains = max(1, len(config.domains))
    num_experts = config.moe.num_experts
    if config.moe.levels == 1 or not config.domains:
        return np.ones((num_domains, num_experts), dtype=bool)
    ends_J = np.cumsum(group_sizes(config))
    group_of_expert_E = np.searchsorted(ends_J, np.arange(num_experts), side="right")
    return group_of_expert_E[None, :] == np.arange(num_domains)[:, None]
