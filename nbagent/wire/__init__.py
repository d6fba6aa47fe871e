"""What processes of nbagent exchange: the control socket and the activity page of a slot."""
