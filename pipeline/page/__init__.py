"""HTML pages that need no server and no network: templates, plots, pictures.  Imports no MindSpore."""
