"""The import rule that import-linter has only for packages: no file imports itself by way of
others.
"""

import grimp
import networkx
from importlinter.application import output
from importlinter.domain.contract import Contract, ContractCheck


class AcyclicFiles(Contract):
    """Broken by any cycle of files, imports under `TYPE_CHECKING` and inside functions included.

    See `[tool.importlinter]`.
    """

    type_name = "acyclic_files"

    def check(self, graph: grimp.ImportGraph, verbose: bool) -> ContractCheck:
        cycles = find_cycles(graph)
        return ContractCheck(kept=not cycles, metadata={"cycles": cycles})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for cycle in check.metadata["cycles"]:
            output.print_error(" -> ".join(cycle))


def find_cycles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Return the shortest way round of each group of files that import each other, its first file
    repeated at the end.
    """
    imports = networkx.DiGraph(
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    )
    groups = [group for group in networkx.strongly_connected_components(imports) if len(group) > 1]
    rounds = [
        min(networkx.simple_cycles(imports.subgraph(group), length_bound=len(group)), key=len) for group in groups
    ]
    return sorted([*files, files[0]] for files in map(_from_first, rounds))


def _from_first(files: list[str]) -> list[str]:
    start = files.index(min(files))
    return files[start:] + files[:start]
