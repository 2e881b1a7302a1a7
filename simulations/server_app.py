"""The ServerApp, see `simulations.federation`."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

# A simulation loads this file before it loads the ClientApp and starts Ray. So torch is imported later, beside them.
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation; on any failure write ``error.json`` and raise."""
    from simulations.federation import main as run_federation

    run_federation(grid, context)
