"""Tables, figures, and Markdown and HTML reports, for any study."""
