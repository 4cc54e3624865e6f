"""The embedded world: pictures of coloured shapes and what is said about them, written as official REFER files."""
