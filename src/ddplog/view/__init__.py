"""What people look at: the terminal's tables, the live view and the report page. Reads runs, never changes them."""
