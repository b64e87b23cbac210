"""A run as one HTML page: `python -m jaxvid.tools.gallery RUN [--out=RUN/gallery.html]`.

The page holds everything itself and loads nothing: the samples of every step, as they moved, the
curves, the figures of the last evaluation beside their guesses, and the config. Open it in a
browser, or send it.
"""

import base64
import html
import io
import json
from pathlib import Path

from absl import flags

from jaxvid import cli, files
from jaxvid.errors import UserError
from jaxvid.tools import history, plot
from jaxvid.training.log import figure

SHOWN = 8  # clips of a step
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #222; background: #fff }
h1, h2 { font-weight: 600; line-height: 1.2 }
figure { margin: 0 0 1rem }
figcaption { color: #666 }
.clips { display: flex; flex-wrap: wrap; gap: 6px }
.clips img { width: 120px; image-rendering: pixelated; border: 1px solid #ddd }
.curves { width: 100% }
table { border-collapse: collapse; margin: 0 0 1rem }
th, td { text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid #eee }
td:not(:first-child) { font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 }
  .curves { background: #fff } .clips img { border-color: #444 }
  th, td { border-color: #333 } figcaption { color: #999 }
}
"""


def page(workdir: str) -> str:
    """The HTML of a run. Raises UserError for a folder that holds none, or a damaged one."""
    rows, config = history.read(workdir), history.settings(workdir)
    name = html.escape(Path(workdir).resolve().name)
    step, total = rows[-1]["step"], html.escape(str(config.get("steps", "?")))
    parts = [
        f"<h1>{name}</h1>",
        f"<p>{html.escape(str(config.get('task', {}).get('name', '')))} on "
        f"{html.escape(str(config.get('data', {}).get('name', '')))}, step {step:,} of {total}</p>",
        *_samples(workdir),
        *_curves(rows, Path(workdir).resolve().name),
        *_scores(rows),
        *_evaluated(workdir),
        "<h2>Config</h2>",
        _table(("field", "value"), _flat(config)),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _samples(workdir):
    found = history.sampled(workdir)
    if not found:
        return []
    parts = ["<h2>Samples</h2>"]
    for step, paths in reversed(found.items()):
        clips = "".join(
            f'<img alt="clip {i} of step {step}" src="{_inline(path.read_bytes(), "image/gif")}">'
            for i, path in enumerate(paths[:SHOWN])
        )
        caption = f"<figcaption>step {step:,}</figcaption>"
        parts.append(f'<figure>{caption}<div class="clips">{clips}</div></figure>')
    return parts


def _curves(rows, name):
    """The panels of `tools.plot`, or a line where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["<h2>Curves</h2>", "<p>not drawn: pip install 'jaxvid[plot]'</p>"]
    runs, drawn, picture = {name: history.curves(rows)}, Figure(layout="constrained"), io.BytesIO()
    shown = plot.panels(runs, [])
    if not shown:
        return []
    plot.draw(drawn, runs, shown)
    drawn.savefig(picture, format="svg")
    source = _inline(picture.getvalue(), "image/svg+xml")
    return ["<h2>Curves</h2>", f'<img class="curves" alt="curves" src="{source}">']


def _scores(rows):
    found = history.scores(rows)
    if not found:
        return []
    step, scores = found
    cells = [(name, figure(value)) for name, value in scores.items()]
    return [f"<h2>Evaluation at step {step:,}</h2>", _table(("metric", "value"), cells)]


def _evaluated(workdir):
    """The single figures of evaluate.json, and its pictures."""
    found = history.evaluated(workdir)
    if found is None:
        return []
    parts = [
        "<h2>evaluate</h2>",
        _table(("figure", "value"), [x for x in _flat(found) if len(str(x[1])) <= 80]),
    ]
    for picture in history.pictures(Path(workdir), "evaluate*.png"):
        source, name = _inline(picture.read_bytes(), "image/png"), html.escape(picture.stem)
        parts.append(f'<figure><img class="curves" alt="{name}" src="{source}"></figure>')
    return parts


def _flat(tree, prefix=""):
    """[(dotted name, text of the value)] of nested dicts."""
    rows = []
    for name, value in tree.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", json.dumps(value)))
    return rows


def _table(head, rows):
    def line(cells, tag):
        cells = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{cells}</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _inline(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def main(workdir):
    """Entry point."""
    out = Path(FLAGS.out or Path(workdir, "gallery.html"))
    if out.suffix != ".html":
        raise UserError(f"--out={out}: is no .html; the page is one")
    if out.is_dir():
        raise UserError(f"--out={out}: is a folder; name a file")
    files.write(out, page(workdir).encode(errors="backslashreplace"))
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB; open it in a browser")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    cli.define_path("out", "The page, an .html. Default: gallery.html in the run.")
    cli.run(main, arguments="RUN")
