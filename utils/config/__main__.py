"""`python -m utils.config` prints docs/configuration.md."""

from utils.config.markdown import settings_markdown

print(settings_markdown(), end="")
