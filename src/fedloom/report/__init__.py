"""Pages, figures and tables over finished run folders."""
