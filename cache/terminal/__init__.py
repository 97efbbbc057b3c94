"""What people see: lines, tables and progress, which know the terminal, and are plain text where there is none."""
