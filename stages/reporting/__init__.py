"""Components of the report stage: reading its inputs, the Markdown pages, the plots and the HTML page."""
