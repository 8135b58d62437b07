"""The command line: one small file a command, and nothing imported that the chosen command does not need."""
