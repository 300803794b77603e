"""`python -m moreh.patches` prints the list of all patches as Markdown, for docs/patches.md."""

from moreh.patches.catalog import markdown

if __name__ == "__main__":
    print(markdown())
