"""What every other package uses: errors, files, locks, processes, timing."""
