"""Runs that `maskloom judge` wrote: their stages are its own."""

from maskloom.pipeline.dataset.contract import CONTRACT_FILE, read_contract
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run


def require_own_stages(run: Run) -> None:
    """Check that the stages of a run are those of its configuration.

    Raises:
        MaskLoomError: `judge` wrote the run.
    """
    for contract in sorted(run.synthetic.glob(f"*/{CONTRACT_FILE}")):
        if read_contract(contract.parent).description.made_elsewhere:
            raise MaskLoomError(
                f"{run.folder}: `maskloom judge` wrote this run, in stages of its own; give that command again, which does "
                "only what is missing or has changed"
            )
