"""`ddplog report`: writes the HTML report."""

from __future__ import annotations

from pathlib import Path

import click

from ddplog.cli.progress import progress
from ddplog.cli.target import find, run_argument
from ddplog.errors import ConfigError


@click.command("report")
@run_argument
@click.option("-o", "--output", "file", metavar="FILE", help="The file; report.html in the run's folder if not given.")
@click.option("--open", "is_opened", is_flag=True, help="Open it in the browser.")
def command(run: str, folder: str | None, file: str | None, is_opened: bool) -> None:
    """Write one self-contained HTML page of charts, and print its path.

    RUN is a run's folder, a run id, or `latest`, which is also the default.
    """
    from ddplog.store.reader import open_run
    from ddplog.view.report import write_report

    with open_run(find(run, folder)) as opened, progress("metrics") as advance:
        target = Path(file) if file is not None else opened.path / "report.html"
        try:
            written = write_report(opened, target, advance)
        except OSError as exc:
            raise ConfigError("output", str(target), f"cannot be written: {exc.strerror}") from exc
    click.echo(written.absolute())
    if is_opened:
        click.launch(str(written.absolute()))
