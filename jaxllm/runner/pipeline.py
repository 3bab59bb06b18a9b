"""The programs of all of a model's stages, in one set."""

from collections.abc import Hashable, Sequence

from jaxllm.runner.kept import KeptPrograms, KeptStages
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.programs import Programs


def make_programs(
    stages: Sequence[Lowering], num_pages: int, kept: Sequence[KeptPrograms | None]
) -> Programs:
    """The closed set, in the order in which it is best made: first those that run every request."""
    found = {
        stage.stage.key(key): source for stage in stages for key, source in stage.programs(num_pages).items()
    }
    ordered = {key: found[key] for key in dict.fromkeys([*first_programs(stages), *found])}
    folders = [one for one in kept if one is not None]
    if len(folders) < len(stages):
        return Programs(ordered)
    return Programs(ordered, folders[0] if len(folders) == 1 else KeptStages(folders))


def first_programs(stages: Sequence[Lowering]) -> list[Hashable]:
    """The fewest that run every request well."""
    return [stage.stage.key(key) for stage in stages for key in stage.first_programs]
