"""What PyPI shows: README with links that lead out of the package, where the repository's address is known."""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class RepositoryLinks(MetadataHookInterface):
    """Makes relative links absolute and lists the project's addresses, if DORALIB_REPOSITORY says where it is.

    `make dist REPOSITORY=https://...` sets it. Without it README stays as it is, and no address is listed.
    """

    def update(self, metadata: dict) -> None:
        """Add readme and urls."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if home := os.environ.get("DORALIB_REPOSITORY", "").rstrip("/"):
            text = re.sub(r"\]\((?!https?://|#)([^)]+)\)", rf"]({home}/blob/main/\1)", text)
            pages = {"Documentation": "tree/main/docs", "Changelog": "blob/main/CHANGELOG.md", "Issues": "issues"}
            metadata["urls"] = {"Homepage": home, **{name: f"{home}/{path}" for name, path in pages.items()}}
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
