"""The workshop beside the house: how the tiny checkpoint was made and measured. The core never imports it."""
