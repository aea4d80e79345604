"""The pictures of docs/method.md: what the method's parts do, drawn by the parts themselves."""
