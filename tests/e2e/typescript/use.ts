// A program that uses the types: it compiles when they say what the API does.
import createClient from "openapi-fetch";
import type { components, paths } from "./api";

type Job = components["schemas"]["Job"];

export async function submitAndRead(baseUrl: string, token: string): Promise<string> {
  const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });

  const created = await client.POST("/api/jobs/create", {
    body: { command: ["echo", "hello"], containerImage: "alpine:3", resources: { cpu: 0.5, memoryMb: 64 }, labels: { team: "a" } },
  });
  if (created.error) {
    throw new Error(`${created.error.code}: ${created.error.hint ?? ""}`);
  }
  const job: Job = created.data;
  const code: number | null | undefined = job.exitCode;
  const status: "queued" | "running" | "succeeded" | string = job.status;

  const list = await client.GET("/api/jobs", { params: { query: { limit: 10 } } });
  const ids: string[] = list.data?.items.map((j) => j.jobId) ?? [];

  const log = await client.GET("/api/jobs/{jobId}/logs", { params: { path: { jobId: job.jobId } } });
  const text = typeof log.data === "object" ? log.data.items.map((i) => i.data ?? "").join("") : "";
  return [status, String(code), ...ids, text].join(" ");
}

// What the API refuses does not compile.
// @ts-expect-error a job has a command
export const incomplete: components["schemas"]["Spec"] = { name: "x" };
