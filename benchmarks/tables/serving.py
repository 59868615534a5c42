"""The sizes on paper in docs/serve.md, computed from the shapes of Llama 8B."""

from experiments.report.table import Table

from .registry import table

LAYERS, RANK = 32, 16
ATTENTION = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
MLP = {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}
SHAPES = {**ATTENTION, **MLP}
HOST_TO_GPU, DISK_TO_HOST, SLOTS = 25e9, 5e9, 10e9  # bytes a second, twice, and bytes


@table("serve-sizes")
def serve_sizes() -> Table:
    """Return the bytes and transfer times of adapters of rank 16 in bfloat16."""
    rows = []
    for label, names in (("q and v", "qv"), ("all seven", SHAPES)):
        parameters = LAYERS * RANK * sum(sum(SHAPES[name]) for name in names)
        size = 2 * parameters
        rows.append(
            [
                label,
                f"{parameters:,}",
                f"{size / 1e6:.1f} MB",
                f"{1e3 * size / 1e9:.1f} GB",
                f"{1e5 * size / 1e12:.2f} TB",
                f"{SLOTS // size:.0f}",
                f"{size / HOST_TO_GPU * 1e3:.1f} ms",
                f"{size / DISK_TO_HOST * 1e3:.1f} ms",
            ]
        )
    head = ["adapters on", "parameters", "bfloat16", "1,000 adapters", "100,000 adapters"]
    return Table([*head, "slots in 10 GB", "host to GPU", "disk to host"], rows)
