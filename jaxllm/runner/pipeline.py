"""The programs of all of a model's stages that are on this host, in one set."""

from collections.abc import Hashable, Sequence

from jaxllm.runner.kept import KeptPrograms, KeptStages
from jaxllm.runner.link import LinkLowering
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.programs import Programs


def make_programs(
    stages: Sequence[Lowering],
    num_pages: int,
    kept: Sequence[KeptPrograms | None],
    links: Sequence[LinkLowering] = (),
) -> Programs:
    """The closed set, in the order in which it is best made: first those that run every request.

    Args:
        links: to stages on other hosts.
    """
    found = {
        stage.stage.key(key): source for stage in stages for key, source in stage.programs(num_pages).items()
    }
    for link in links:
        found |= link.programs
    ordered = {key: found[key] for key in dict.fromkeys([*first_programs(stages, links), *found])}
    folders = [one for one in kept if one is not None]
    if len(folders) < len(stages):
        return Programs(ordered)
    return Programs(ordered, folders[0] if len(folders) == 1 else KeptStages(folders))


def first_programs(stages: Sequence[Lowering], links: Sequence[LinkLowering] = ()) -> list[Hashable]:
    """The fewest that run every request well."""
    own = [stage.stage.key(key) for stage in stages for key in stage.first_programs]
    return own + [key for link in links for key in link.first_programs]
