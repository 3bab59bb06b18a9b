"""The pages one running request holds."""

from dataclasses import dataclass

from jaxllm.cache.pages import NULL_PAGE


@dataclass(slots=True)
class PageTables:
    """A page table for each group. All have equally many columns; column c begins at position c * page_size.

    Columns are only ever appended. The first ones of a sliding group become the null page when no later
    query can see them.
    """

    groups: list[list[int]]
    first_held: list[int]
    """For each group the first column that is not the null page (its length if there is none)."""
    num_registered: int
    """Leading columns whose pages have been entered in the prefix cache, or were taken from it."""

    @property
    def num_columns(self) -> int:
        return len(self.groups[0])

    def held(self) -> list[int]:
        """The pages held, column by column from the last to the first."""
        return [
            table[column]
            for column in range(self.num_columns - 1, -1, -1)
            for table in self.groups
            if table[column] != NULL_PAGE
        ]
