"""Tables, figures and one HTML page, for the report of any study."""
