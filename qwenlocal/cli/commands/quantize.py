"""`qwenlocal quantize`: write a GGUF file with other types."""

from __future__ import annotations

import os
import shlex

from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import WriteOptions, choose_targets, read_options, write_or_show
from qwenlocal.errors import UsageError
from qwenlocal.library.names import LocalCheckpointName


def quantize_file(options: WriteOptions) -> None:
    """Quantize a GGUF file; with `--dry-run`, only show the plan."""
    from qwenlocal.terminal.ansi import escape_controls
    from qwenlocal.weights.diagnosis import diagnose_file
    from qwenlocal.weights.quantization import plan_quantization

    types, overrides, imatrix = read_options(options)
    app = AppContext(quiet=options.as_json)
    name = app.library.models.resolve(options.source)
    if isinstance(name, LocalCheckpointName):
        raise UsageError(
            f"{options.source} is a checkpoint.", hint=f"Convert it: qwenlocal convert {shlex.quote(options.source)}"
        )
    record = app.library.models.ensure_model(name)
    targets = choose_targets(options, record.path.stem, types)
    for path, _ in targets:
        if os.path.exists(path) and path.samefile(record.path):  # Path.exists raises without permission
            raise UsageError(f"{path} is both input and output.", hint="Write to another file.")
    plan = plan_quantization(record.path, targets, overrides, imatrix, requantize=options.requantize)
    serious = [finding for finding in diagnose_file(record.path, weights=False).findings if finding.is_serious]
    for finding in serious:
        app.say(f"The metadata has a fault, which is copied: {escape_controls(finding.problem)}")
    if any(finding.can_be_fixed for finding in serious):
        app.say(f"To repair it first: qwenlocal inspect {shlex.quote(options.source)} --fix -o FILE")
    write_or_show(app, plan, options)
