// What every program of Node begins with: a feature is tried, and its outcome printed between tabs.
export async function tried(feature, task) {
  let outcome = "works";
  let said;
  try {
    said = String(await task());
  } catch (error) {
    const status = error.statusCode ?? error.status;
    said = `${status ?? ""} ${error.message}`;
    outcome = status === 400 ? "refused" : "broken";
  }
  console.log([feature, outcome, said.replace(/\s+/g, " ").slice(0, 160)].join("\t"));
}
