"""What the report stage is made of: reading its inputs, the Markdown pages, the plots and the HTML page."""
