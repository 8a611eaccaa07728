"""What came of runs, for people to look at: a table of several, a page for each. Import its modules only when a page is made."""
