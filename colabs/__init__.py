"""One notebook a question. `make colabs` executes them; what they call stands in research/."""

REPOSITORY = "parsimony-research/parsimony"  # on GitHub: of badges and of the first cells, and nowhere else
