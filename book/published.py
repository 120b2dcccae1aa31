"""What the published book needs and no setting can say: where it lies, and what need not lie there.

Jupyter Book loads this as a local extension of Sphinx, see ``_config.yml``.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from PIL import Image
from sphinx.transforms.post_transforms.images import ImageConverter

# Of MathJax: what its one file that pages load may ask for, also from its menu, in English.
MATHJAX = ("tex-chtml.js", "a11y/", "input/tex/", "output/", "ui/")
MATHJAX += tuple(f"sre/mathmaps/{name}.json" for name in ("base", "en", "nemeth"))

# Here and not in ``_config.yml``, since Sphinx warns of settings whose extension is not loaded.
WITH_ADDRESS = {
    "sitemap_url_scheme": "{link}",
    "sitemap_excludes": ["genindex.html", "search.html"],
    "ogp_type": "book",
    "ogp_social_cards": {"image": "book/_static/card.png", "image_mini": "book/_static/card.png"},
}


def repository(folder: Path) -> str | None:
    """``owner/name`` of the repository on GitHub that the book is built from, if there is one."""
    if name := os.environ.get("GITHUB_REPOSITORY"):
        return name
    asked = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    try:
        url = subprocess.run(asked, capture_output=True, encoding="utf-8").stdout.strip()
    except OSError:  # no git
        return None
    found = re.fullmatch(r".*\bgithub\.com[:/]([\w.-]+/[\w.-]+?)(\.git)?/?", url)
    return found and found[1]


def address(name: str) -> str:
    """Where GitHub publishes the pages of ``owner/name``."""
    owner, _, project = name.partition("/")
    host = f"{owner.lower()}.github.io"
    return f"https://{host}/" if project.lower() == host else f"https://{host}/{project}/"


def say_where(app, config):
    """The book's links lead to the repository that builds it, and its pages say their address."""
    name = repository(Path(app.confdir))
    if name:
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        options = config.html_theme_options
        written = options["repository_url"]
        options["repository_url"] = f"{server}/{name}"
        options["extra_footer"] = options["extra_footer"].replace(written, f"{server}/{name}")
        config.html_baseurl = config.ogp_site_url = address(name)
        config.ogp_site_name = config.html_title
        for key, value in WITH_ADDRESS.items():
            setattr(config, key, value)

        def read(app, page, source):
            source[0] = source[0].replace(written, f"{server}/{name}")

        app.connect("source-read", read)


class Lighter(ImageConverter):
    """Pictures become WebP: plots without loss, photographs and heat maps in high quality."""

    def match(self, node) -> bool:
        return self.app.builder.format == "html" and "image/png" in self.guess_mimetypes(node)

    def get_conversion_rule(self, node) -> tuple[str, str]:
        return "image/png", "image/webp"

    def convert(self, _from: str, _to: str) -> bool:
        with Image.open(_from) as picture:
            plot = picture.getcolors(2**15) is not None
            picture.save(_to, "WEBP", lossless=plot, quality=90, method=4)
        return True


def name_roles(app, page, template, context, doctree):
    """An entry of the references is an item of their list, which docutils' outdated role is not."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def leave_out(app, failed):
    """Remove what extensions and the theme lay into the book and no page loads."""
    static = Path(app.outdir) / "_static"
    unused = list(static.rglob("*.map"))
    for path in (static / "mathjax").rglob("*"):
        if not path.relative_to(static / "mathjax").as_posix().startswith(MATHJAX):
            unused += [path] if path.is_file() else []
    for path in unused:
        path.unlink()
    shutil.rmtree(static / "locales", ignore_errors=True)


def setup(app):
    if repository(Path(app.confdir)):  # both need an address
        app.setup_extension("sphinx_sitemap")
        app.setup_extension("sphinxext.opengraph")
    app.connect("config-inited", say_where, priority=400)  # before the theme reads the options
    app.connect("html-page-context", name_roles)
    app.connect("build-finished", leave_out, priority=900)  # after all have copied
    app.add_post_transform(Lighter)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
