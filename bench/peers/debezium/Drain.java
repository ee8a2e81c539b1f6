import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.format.Json;
import java.io.BufferedWriter;
import java.io.FileReader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.List;
import java.util.Properties;

/**
 * Drains a slot through Debezium's engine into a consumer that counts and marks: {@code Drain PROPERTIES ROWS [TIMES]}.
 *
 * <p>After ROWS changes it prints one line of JSON (nanoseconds from the start of the JVM's clock: engine started, first
 * batch handed over, half of the rows, all of them), and exits. With TIMES, the name of a file, it writes a line for each
 * change instead: the time of the callback in microseconds since 1970, a space, the record's key.
 */
public final class Drain implements DebeziumEngine.ChangeConsumer<ChangeEvent<String, String>> {
    private final long rows;
    private final BufferedWriter times;
    private long seen;
    private long batches;
    private long bytes;
    private long first;
    private long half;

    private static long started;

    private Drain(long rows, BufferedWriter times) {
        this.rows = rows;
        this.times = times;
    }

    @Override
    public void handleBatch(
            List<ChangeEvent<String, String>> records,
            DebeziumEngine.RecordCommitter<ChangeEvent<String, String>> committer)
            throws InterruptedException {
        long now = System.nanoTime();
        if (batches++ == 0) {
            first = now;
        }
        long micros = times == null ? 0 : ChronoUnit.MICROS.between(Instant.EPOCH, Instant.now());
        for (ChangeEvent<String, String> record : records) {
            if (record.value() != null) { // the tombstone after a delete is not a change
                seen++;
                bytes += record.value().length();
                if (times != null) {
                    write(micros, record.key());
                }
            }
            committer.markProcessed(record);
        }
        committer.markBatchFinished();
        if (half == 0 && seen >= rows / 2) {
            half = System.nanoTime();
        }
        if (seen >= rows) {
            finish(System.nanoTime());
        } else if (times != null) {
            flush();
        }
    }

    private void write(long micros, String key) {
        try {
            times.write(micros + " " + key + "\n");
        } catch (java.io.IOException error) {
            throw new java.io.UncheckedIOException(error);
        }
    }

    private void flush() {
        try {
            times.flush();
        } catch (java.io.IOException error) {
            throw new java.io.UncheckedIOException(error);
        }
    }

    private void finish(long now) {
        if (times != null) {
            flush();
        }
        System.out.printf(
                "{\"rows\": %d, \"batches\": %d, \"bytes\": %d, \"started\": %d, \"first\": %d, \"half\": %d, \"end\": %d}%n",
                seen, batches, bytes, started, first, half, now);
        System.out.flush();
        // The engine's shutdown is not what is measured, and it may wait for its threads.
        Runtime.getRuntime().halt(0);
    }

    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        try (FileReader file = new FileReader(arguments[0])) {
            properties.load(file);
        }
        BufferedWriter times = arguments.length > 2 ? Files.newBufferedWriter(Path.of(arguments[2])) : null;
        started = System.nanoTime();
        DebeziumEngine<ChangeEvent<String, String>> engine =
                DebeziumEngine.create(Json.class)
                        .using(properties)
                        .using((success, message, error) -> {
                            if (error != null) {
                                error.printStackTrace();
                            }
                            System.err.println("the engine ended: " + message);
                            Runtime.getRuntime().halt(1);
                        })
                        .notifying(new Drain(Long.parseLong(arguments[1]), times))
                        .build();
        engine.run();
    }
}
