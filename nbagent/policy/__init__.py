"""Pure decisions: state, time and settings in; actions out."""
