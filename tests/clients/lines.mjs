// What the scripts share: one JSON argument in, JSON lines out, and an end with the test that started them.

/**
 * Runs `main` with the script's JSON argument and a function that prints one JSON line.
 * The script ends with `main`, or when its standard input closes: the test holds the other end of it.
 */
export async function run(main) {
  process.stdin.on('end', () => process.exit(0)).resume();
  const print = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);
  await main(JSON.parse(process.argv[2]), print);
  process.exit(0);
}
